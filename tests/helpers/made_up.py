"""Grids whose cells are made up, so that what their report should say is known."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from steertune.recipes import report
from steertune.recipes.ablate import GRID, write_grid
from steertune.recipes.ablation.cells import read_cells
from steertune.recipes.ablation.grid import Cell, Grid, make_grid
from steertune.recipes.lab.files import read_result
from steertune.recipes.lab.rows import BASE, MATCHED, TUNED, Record

TABLES = """
name = "made_up"
base = "vector_dpo"
arms = ["full_dpo"]
tasks = ["warm_tone", "cautious_advice"]
examples = [4, 16, 64]
seeds = [0, 1, 2, 3, 4, 5]

[card]
problem = "Does the form matter?"
hypothesis = "The vector is more accurate at the same KL."
against = "LoRA is as accurate."
baselines = "LoRA and full finetuning."
[card.affordances]
"*" = "the same pairs"

[claim]
better = "form=bias,contrast=pairs"
than = "form=lora,contrast=none"
measure = "accuracy"
strength = "matched"
tasks = "fixed"

[design]
kind = "full"
start = { form = "lora", contrast = "none" }
end = { form = "bias", contrast = "pairs" }

[factors.form]
lora = { adapter = { type = "lora", r = 8, target_modules = "all-linear" } }
bias = {}

[factors.contrast]
none = { loss.contrast = "none" }
pairs = {}
"""


ROWS = 40


Score = Callable[[Cell], float]


def by_form(cell: Cell, gain: float = 0.1) -> float:
    """The form is worth `gain`, the contrast nothing, every doubling of the examples 0.02."""
    levels = cell.arm.levels or {}
    return 0.55 + gain * (levels.get("form") == "bias") + 0.02 * np.log2(cell.examples)


BASE_MARGINS = [1.0, -1.0] * (ROWS // 2)


NEUTRAL = {"neutral_kl": [0.1], "neutral_nll": [math.log(6.0)], "neutral_tokens": [1]}


def observed(margins: Sequence[float], score: float) -> dict[str, list[Any]]:
    """What was seen of a model with these margins, whose four answers have this score and repeat nothing."""
    return {"margin": [*map(float, margins)], "score": [score] * 4, "answer": ["one two three four"] * 4}


def change(folder: Path, edit: Callable[[Record], None]) -> None:
    """Edit every cell of a folder."""
    for file in sorted(folder.rglob("cell.json")):
        record = Record.read(file)
        edit(record)
        record.write(file)


def cells_of(folder: Path) -> pd.DataFrame:
    """The cells with the levels of their arms."""
    return read_cells(folder, read_result(folder / GRID, ""))


def make_up(folder: Path, score: Score, seed: int = 0, keep: Callable[[Cell], bool] = lambda cell: True) -> Grid:
    """Cells whose accuracy is `score` up to a little noise of their seed and of their own."""
    grid = make_grid(tomllib.loads(TABLES))
    write_grid(folder, grid, ["made_up", "--data-root", "/somewhere"])
    for cell in filter(keep, grid.cells()):
        rng = np.random.default_rng([seed, cell.seed, cell.examples, *map(ord, cell.task.label + cell.arm.name)])
        shared = np.random.default_rng([seed, cell.seed, len(cell.task.label)]).normal(0, 0.05)
        # the same rows are hard for all cells, about
        hard = np.random.default_rng(len(cell.task.label)).permutation(ROWS) + rng.normal(0, 2, ROWS)
        right = hard.argsort().argsort() < ROWS * np.clip(score(cell) + shared + rng.normal(0, 0.02), 0, 1)
        arm = observed(np.where(right, 1.0, -1.0), 0.6)
        observations = {
            BASE: {**observed(BASE_MARGINS, 0.5), "neutral_nll": [math.log(5.5)], "neutral_tokens": [1]},
            TUNED: {**arm, **NEUTRAL},
        }
        scalable = cell.arm.levels is not None  # full finetuning has no strength
        if scalable:
            observations[MATCHED] = arm
        keys = {"arm": cell.arm.name, "task": cell.task.label, "examples": cell.examples, "seed": cell.seed}
        facts = {
            "key": cell.key, "status": "ok", "error": None, "scalable": scalable, "tuning": [], "parameters": 576,
            "setting": {"rate": 1.0, "steps": 16, "strength": 1.0}, "train_seconds": 1.0, "tuning_seconds": 2.0,
            "pairs_read": 64, "tokens_read": 999, "peak_memory_gb": 1.0,
        }  # fmt: skip
        file = folder / cell.path / "cell.json"
        file.parent.mkdir(parents=True)
        Record(keys, observations, facts).write(file)
    return grid


@contextmanager
def undrawn() -> Iterator[None]:
    """Figures are made and not drawn inside, which takes most of a report's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, file, **_: Path(file).write_bytes(b"not drawn"))
        yield


@pytest.fixture(autouse=True)
def pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Figures are drawn for tests of figures only (`drawn`)."""
    with nullcontext() if "drawn" in request.fixturenames else undrawn():
        yield


@pytest.fixture
def drawn() -> None:
    """Asks for figures that are drawn."""


class Made(NamedTuple):
    """A made-up grid and its report."""

    folder: Path
    grid: Grid
    page: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The grid of `by_form`, for tests that only read its report."""
    folder = tmp_path_factory.mktemp("made")
    grid = make_up(folder, by_form)
    with undrawn():
        return Made(folder, grid, said(folder))


def said(folder: Path) -> str:
    return report.write_report(folder).read_text(encoding="utf-8")


def ends_in(header: list[str], title: str, row: list[str]) -> tuple[float, float]:
    """The ends of an interval in a row of a report's table; infinite where they are unknown."""
    text = row[header.index(title)]
    low, high = map(float, text.strip("[]").split(", ")) if text != "unknown" else (-np.inf, np.inf)
    return low, high


def tables_of(page: str) -> list[list[list[str]]]:
    """The tables of a page, each a list of rows."""
    found = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    # a "|" inside a cell is escaped
    return [
        [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
        for table in found
    ]
