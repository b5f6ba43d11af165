"""The cells of a grid as a table that statistics can read: a row for each cell, a column for each measure.

`column("accuracy", "matched")` is the mean of a measure at a strength, and `rows_of` its values for every example.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.statistics.rows import examples_of
from steertune.recipes.ablation.store import Store
from steertune.recipes.lab import measures
from steertune.recipes.lab.files import ArmError, read_result
from steertune.recipes.lab.measures import Missing
from steertune.recipes.lab.rows import AGAIN, BASE, MATCHED, TUNED, Record

_PATH = r"cells/([\w=,+-][\w=,+.-]*)/n(\d{1,9})/seed(\d{1,10})/([\w=,+-][\w=,+.-]*)"


def column(measure: str, strength: str = TUNED) -> str:
    """The column of a measure at a strength."""
    return f"{measure}@{strength}"


def read_cells(folder: Path, grid: Mapping[str, Any] | None = None) -> Frame:
    """Every cell of a folder, or those of a grid.

    A diverged cell counts with what its user would be left with, the base model; its `status` says so. A cell that
    failed for another reason has no numbers, and `status` "failed".

    Args:
        folder: A grid's folder.
        grid: The `grid.json`; None: all cells that are there.

    Raises:
        ArmError: there is none, one is damaged, or the grid names a path that is not that of a cell.
    """
    records = {tuple(record.keys.values()): record for record in Store(folder).records()}
    levels: dict[str, Any] = {}
    if grid is not None:
        names = [_parsed(path) for path in grid["cells"]]
        records |= {name: failed for name in names if name not in records and (failed := _failed(folder, name))}
        records = {name: records[name] for name in names if name in records}
        levels = {arm["name"]: arm["levels"] or {} for arm in grid["arms"]}
    if not records:
        raise ArmError(f"{folder} holds no cells. Run the grid first: steertune ablate.")
    return cells_table([*records.values()], levels)


def cells_table(records: Sequence[Record], levels: Mapping[str, Mapping[str, str]] | None = None) -> Frame:
    """Records as a table; `levels` says which level of every factor an arm has."""
    rows = [{**_row(record), **(levels or {}).get(record.keys["arm"], {})} for record in records]
    cells = pd.DataFrame(rows)
    names = [column(name, strength) for name in measures.names() for strength in (BASE, TUNED, MATCHED)]
    missing: dict[str, Any] = {name: float("nan") for name in names if name not in cells}
    missing |= {examples_of(name): None for name in names if examples_of(name) not in cells}
    cells = pd.concat([cells, pd.DataFrame(missing, index=cells.index)], axis=1)
    # a cell that diverged before it saw neutral text knows no perplexity of the base; the others do
    base = column("perplexity", BASE)
    cells[base] = cells[base].fillna(cells[base].mean())
    diverged = cells["status"] == "diverged"
    cells.loc[diverged, column("perplexity")] = cells.loc[diverged, base]
    cells.loc[diverged, column("perplexity_ratio")] = 1.0
    return cells


def _row(record: Record) -> dict[str, Any]:
    """Keys, facts, and the measures at every strength."""
    facts = {name: value for name, value in record.facts.items() if name not in ("tuning", "setting", "notes")}
    row: dict[str, Any] = {**record.keys, **facts}
    row |= {f"setting_{name}": value for name, value in (record.facts.get("setting") or {}).items()}
    observations = dict(record.observations)
    if record.facts.get("status") == "diverged" and BASE in observations:
        as_base = {**observations[BASE], "kl": [0.0]}
        observations |= {TUNED: as_base} | ({MATCHED: as_base} if record.facts.get("scalable") else {})
    seen = Record(record.keys, observations)
    for strength in (label for label in (BASE, TUNED, MATCHED) if label in observations):
        for measure in map(measures.get, measures.names()):
            try:
                values = measure.values(seen.seen(strength))
                mean = measure.summary(seen.seen(strength))
            except Missing:
                continue
            if not math.isnan(mean):
                row |= {column(measure.name, strength): mean, examples_of(column(measure.name, strength)): values}
    return row


def _parsed(path: str) -> tuple[Any, ...]:
    """Arm, task, number of examples and seed of a cell's path."""
    match = re.fullmatch(_PATH, path, re.ASCII)
    if match is None:
        raise ArmError(f"{path!r:.200} is not the path of a cell (cells/<task>/n<examples>/seed<seed>/<arm>).")
    task, examples, seed, arm = match.groups()
    return arm, task, int(examples), int(seed)


def _failed(folder: Path, name: tuple[Any, ...]) -> Record | None:
    """The record of a cell that failed; None if it did not run."""
    arm, task, examples, seed = name
    file = folder / "cells" / task / f"n{examples}" / f"seed{seed}" / arm / "failed.json"
    if not file.exists():
        return None
    keys = {"arm": arm, "task": task, "examples": examples, "seed": seed}
    return Record(keys, facts={"status": "failed", "error": str(read_result(file, AGAIN).get("error"))})
