"""The labels of arms in a report: `form=bias,layers=one,contrast=pairs` is "vector, one layer, pairs"."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from steertune.recipes.ablation.designs import Combination
from steertune.recipes.ablation.levels import INERT
from steertune.recipes.ablation.tables import GridTables

_WORDS = {"bias": "vector", "lora": "LoRA", "dpo": "DPO", "icv": "ICV", "ia3": "IA3", "kl": "KL", "sft": "SFT"}
_SPEAK_FOR_THEMSELVES = ("form", "learner", "contrast", "method")
"""Factors whose levels are clear without the factor's name."""


def arm_labels(tables: GridTables, arms: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Name of every arm of a `grid.json` -> what a report calls it; no two have the same label.

    A factor is named only where it distinguishes arms: not if all arms have the same level of it, nor where the level
    is the one at both ends of the design.
    """
    all_levels = [arm["levels"] for arm in arms if arm["levels"]]
    varied = [f for f in tables.factors if len({levels.get(f) for levels in all_levels} - {INERT}) > 1]
    start, end = tables.design.start, tables.design.end
    usual = {f: level for f, level in start.items() if end.get(f) == level}
    labels = {}
    for arm in arms:
        levels = arm["levels"] or {}
        shown = [f for f in varied if levels.get(f) in tables.factors[f] and levels[f] != usual.get(f)]
        parts = [level_label(f, levels[f]) for f in shown]
        labels[arm["name"]] = ", ".join(parts) or in_words(arm["name"])
    count = Counter(labels.values())
    return {name: label if count[label] == 1 else name for name, label in labels.items()}


def level_label(factor: str, level: str) -> str:
    """A level in words: "no contrast", "one layer", "LoRA"."""
    if level in ("none", "no", "off"):
        return f"no {in_words(factor)}"
    if level in ("all", "one") and factor.endswith("s"):
        return f"{level} {in_words(factor if level == 'all' else factor[:-1])}"
    return in_words(level) if factor in _SPEAK_FOR_THEMSELVES else f"{in_words(factor)} {in_words(level)}"


def combination_label(combination: Combination) -> str:
    """A combination of levels in words."""
    return ", ".join(level_label(factor, level) for factor, level in combination.items() if level != INERT)


def in_words(text: str) -> str:
    """A text with names of levels and arms in words: "form: bias − lora" is "form: vector − LoRA"."""
    return re.sub(r"[^\W_]+", lambda word: _WORDS.get(word[0], word[0]), text.replace("_", " "))
