"""The strengths at which a trained model has stated KLs to the base, on the neutral rows that are for matching."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from steertune.recipes.ablation.matched import Point, frontier
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.observe import NEUTRAL_BATCH, HeldOut, against_base, answer_logps
from steertune.trainers import Batch, scaled

SEARCH_ROWS = 4
"""Rows that the search starts with."""


def strengths_at(
    model: Any, held_out: HeldOut, targets: Sequence[float], largest: float, size: int = NEUTRAL_BATCH
) -> tuple[list[Point], bool]:
    """Find the strength of every KL, measured on the rows for matching; `size` is the rows of a forward pass.

    Returns:
        A point for every target, the smallest first, and whether the KL was seen to fall while the strength grew.
    """
    matching, base = held_out.matching, held_out.base_logps("matching")
    assert matching is not None

    @cache
    def shown(rows: int) -> list[Batch]:
        return batches(held_out.tokenizer, matching.select(range(rows)), size)

    @cache
    def kl(strength: float, rows: int) -> float:
        with scaled(model, strength):
            logps = answer_logps(model, shown(rows))
        observed = against_base(logps, base)
        return sum(observed["neutral_kl"]) / sum(observed["neutral_tokens"])

    few, every = min(SEARCH_ROWS, len(base)), len(base)
    return frontier(lambda s: kl(s, few), lambda s: kl(s, every), targets, largest)
