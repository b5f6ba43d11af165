"""The tables of a small grid, and how tests change them."""

from __future__ import annotations

import copy
import tomllib
from typing import Any

from tiny_grids import CARD, FORM_AND_INIT

from steertune.recipes.ablation import grid as module
from steertune.recipes.ablation.grid import Grid, make_grid
from steertune.recipes.ablation.tables import GridTables

GRID = (
    """
name = "small"
base = "vector_dpo"
arms = ["mean_difference", "base"]
tasks = ["warm_tone", { name = "cautious_advice", reverse = true, scorer = { kind = "rule", pattern = "careful" } }]
examples = [4, 8]
seeds = [0, 1]
trainer = { per_device_train_batch_size = 2 }
budget = { trials = 2, steps = [4], strengths = [1.0, 2.0] }

[claim]
better = "form=bias,init=zeros"
than = "form=lora,init=-"

[design]
kind = "full"
"""
    + CARD
    + FORM_AND_INIT
)


ARMS = ["form=lora,init=-", "form=bias,init=zeros", "form=bias,init=mean_difference", "mean_difference", "base"]


DELETE = object()


Changes = dict[str, Any]


def changed(changes: Changes | None = None) -> dict[str, Any]:
    """The tables of the small grid with some values set, `{"table.key": value}`, or taken away."""
    made = tomllib.loads(GRID)
    for path, value in (changes or {}).items():
        *tables, last = path.split(".")
        table = made
        for name in tables:
            table = table.setdefault(name, {})
        if value is DELETE:
            del table[last]
        else:
            table[last] = copy.deepcopy(value)
    return made


def built(changes: Changes | None = None) -> Grid:
    """The grid; without a claim it gets one between its first and last arm, which no test here is about."""
    made = changed(changes)
    if "claim" not in made:
        tables = GridTables(**made)
        names = [arm.name for arm in module._arms(tables, module._combinations(tables)[0])]
        made["claim"] = {"better": names[0], "than": names[-1], "measure": "accuracy", "strength": "tuned"}
    return make_grid(made)


def factorial(factors: dict[str, Any], **changes) -> Grid:
    """A grid of these factors only."""
    return built({"arms": [], "claim": DELETE, "factors": factors} | changes)


def arms(grid: Grid) -> dict[str, Any]:
    return {arm.name: arm.arm for arm in grid.arms}
