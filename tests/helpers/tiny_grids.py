"""Grids of tiny cells, and how to run them."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tiny_data

import steertune.recipes.ablate as recipe
from steertune.recipes.ablation.context import Context
from steertune.recipes.ablation.grid import Cell, Grid, make_grid
from steertune.recipes.lab import measures
from steertune.recipes.lab.rows import MATCHED, TUNED, Record

CARD = """
[card]
problem = "Which form learns from four pairs?"
hypothesis = "The vector needs fewer examples than LoRA."
against = "LoRA is at least as accurate at the same KL."
baselines = "LoRA, the untrained mean difference, the base model."
[card.affordances]
"*" = "the same pairs"
"""
FORM_AND_INIT = """
[factors.form]
lora = { adapter = { type = "lora", r = 2, target_modules = "all-linear" }, trainer = { learning_rate = 1e-3 } }
bias = {}

[factors.init]
zeros = [{ when = { form = "lora" }, inert = true }, {}]
mean_difference = [{ when = { form = "lora" }, inert = true }, { adapter = { init = "mean_difference" } }]
"""
GRID = (
    """
name = "tiny"
base = "vector_dpo"
arms = ["mean_difference", "base"]
tasks = [{ name = "task", scorer = { kind = "rule", pattern = "cat" } }]
examples = [4]
seeds = [0, 1]
neutral = "neutral.jsonl"
generations = 2
new_tokens = 4
questions = 2
trainer = { per_device_train_batch_size = 2 }
splits = { validation = 4, test = 6, scorer = 2, near_duplicates = 1.0 }
matched = { kl = 1e-4, frontier = [1e-4, 1e-3] }
budget = { trials = 2, steps = [2], strengths = [1.0, 2.0] }

[claim]
better = "form=bias,init=zeros"
than = "form=lora,init=-"
tasks = "fixed"

[design]
kind = "full"
start = { form = "lora", init = "zeros" }
end = { form = "bias", init = "mean_difference" }
"""
    + CARD
    + FORM_AND_INIT
)


def make_tables(tmp_path: Path) -> dict:
    tiny_data.save_model(tmp_path / "model", max_position_embeddings=512)
    task = tiny_data.save_task(tmp_path / "task", train=tiny_data.pairs(24, 24), test=tiny_data.pairs(6, 6))
    tiny_data.demonstrations(4, seed=5).to_json(tmp_path / "neutral.jsonl")
    made = tomllib.loads(GRID)
    made["model"] = {"name": str(tmp_path / "model"), "threads": 1}
    made["neutral"] = str(tmp_path / "neutral.jsonl")
    made["tasks"][0]["name"] = task
    return made


def run(tables: dict, folder: Path, **options) -> list[dict]:
    grid = make_grid(tables)
    failed = recipe.run(grid.cells(), Context(grid), folder, show=False, **options)
    assert failed == []
    return read(grid, folder)


def read(grid: Grid, folder: Path) -> list[dict]:
    return read_all(grid.cells(), folder)


def read_all(cells: list[Cell], folder: Path) -> list[dict]:
    return [flat(Record.read(folder / cell.path / "cell.json")) for cell in cells]


def flat(record: Record) -> dict:
    """A record as one dictionary: keys, facts, and per strength the mean of every measure, margins and answers."""
    found = {**record.keys, **record.facts}
    for strength, prefix in ((TUNED, ""), (MATCHED, "matched_")):
        if strength not in record.observations:
            continue
        seen = record.seen(strength)
        found |= {prefix + name: record.value(name, strength) for name in measures.names()}
        found |= {f"{prefix}margins": seen["margin"].tolist(), f"{prefix}answers": seen.observations.get("answer")}
    return found


def results(cells: list[dict]) -> list[dict]:
    """Cells without what depends on the clock and the machine."""
    clock = ("seconds", "train_seconds", "tuning_seconds", "peak_memory_gb")
    return [{k: v for k, v in cell.items() if k not in clock} for cell in cells]


def assert_alike(one: Any, other: Any, where: str = "cells") -> None:
    """Raise an AssertionError if results of two processes differ by more than rounding.

    Two processes may add up in another order: kernels are chosen by where memory lies and by the number of threads.
    The search for a strength magnifies that: a KL of 1e-4 is known to three digits in fp32.
    """
    if isinstance(other, dict):
        assert one.keys() == other.keys(), where
        for key, value in other.items():
            assert_alike(one[key], value, f"{where}.{key}")
    elif isinstance(other, list | tuple):
        assert len(one) == len(other), where
        for index, (value, expected) in enumerate(zip(one, other, strict=True)):
            assert_alike(value, expected, f"{where}[{index}]")
    else:
        expected = pytest.approx(other, rel=1e-2, abs=1e-4, nan_ok=True) if isinstance(other, float) else other
        assert one == expected, where


def toml(tables: dict) -> str:
    """A grid's tables as TOML; JSON's inline values are valid TOML once written key by key."""

    def inline(value) -> str:
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{json.dumps(k)} = {inline(v)}" for k, v in value.items()) + " }"
        if isinstance(value, list):
            return "[" + ", ".join(inline(v) for v in value) + "]"
        return json.dumps(value)

    return "\n".join(f"{key} = {inline(value)}" for key, value in tables.items())
