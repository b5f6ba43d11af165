"""The cells of a grid as a table that statistics can read: a row for each cell, a column for each measure.

`column("accuracy", "matched")` is the mean of a measure at a strength, and `rows_of` its values for every example. At
`frontier` it is the mean over the KLs of an arm's frontier; an arm that cannot reach a KL counts with its last point
there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.statistics.rows import examples_of
from steertune.recipes.ablation.store import Store
from steertune.recipes.lab import measures
from steertune.recipes.lab.files import ArmError, read_result
from steertune.recipes.lab.measures import Measure, Missing, Seen
from steertune.recipes.lab.rows import AGAIN, BASE, FRONTIER, KEYS, MATCHED, TUNED, Record, at_kl, frontier_kl

_PATH = r"cells/([\w=,+-][\w=,+.-]*)/n(\d{1,9})/seed(\d{1,10})/([\w=,+-][\w=,+.-]*)"


def column(measure: str, strength: str = TUNED) -> str:
    """The column of a measure at a strength."""
    return f"{measure}@{strength}"


def read_cells(folder: Path, grid: Mapping[str, Any] | None = None) -> Frame:
    """Read every cell of a folder, or of a grid.

    A diverged cell counts as the base model, which is all that a user would have left; its `status` says so. A cell
    that failed for another reason has no numbers, and its `status` is "failed".

    Raises:
        ArmError: the folder holds no cell, one is damaged, or the grid names a path that is not that of a cell.
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
    names = [column(name, strength) for name in measures.names() for strength in (BASE, TUNED, MATCHED, FRONTIER)]
    missing: dict[str, Any] = {name: float("nan") for name in names if name not in cells}
    missing |= {examples_of(name): None for name in names if examples_of(name) not in cells}
    cells = pd.concat([cells, pd.DataFrame(missing, index=cells.index)], axis=1)
    # a cell that diverged before neutral text was measured lacks the base's perplexity; take it from the others
    base = column("perplexity", BASE)
    cells[base] = cells[base].fillna(cells[base].mean())
    diverged = cells["status"] == "diverged"
    cells.loc[diverged, column("perplexity")] = cells.loc[diverged, base]
    cells.loc[diverged, column("perplexity_ratio")] = 1.0
    return cells


def _row(record: Record) -> dict[str, Any]:
    """A record as a row: its keys, its facts, and the measures at every strength."""
    facts = {name: value for name, value in record.facts.items() if name not in ("tuning", "setting", "notes")}
    row: dict[str, Any] = {**record.keys, **facts}
    row |= {f"setting_{name}": value for name, value in (record.facts.get("setting") or {}).items()}
    observations = dict(record.observations)
    if record.facts.get("status") == "diverged" and BASE in observations:
        # a frontier of one point is the same at any KL
        strengths = (TUNED, MATCHED, at_kl(1.0)) if record.facts.get("scalable") else (TUNED,)
        observations |= {strength: {**observations[BASE], "kl": [0.0]} for strength in strengths}
    whole = Record(record.keys, observations)
    views = {label: whole.seen(label) for label in observations}
    for measure in map(measures.get, measures.names()):
        at = {label: summary for label, seen in views.items() if (summary := _summary(measure, seen)) is not None}
        points = {kl: at[label] for label in at if (kl := frontier_kl(label)) is not None}
        if points:
            at[FRONTIER] = _over_log_kl(points)
        for label, (mean, values) in at.items():
            row |= {column(measure.name, label): mean, examples_of(column(measure.name, label)): values}
    return row


_Summary = tuple[float, NDArray[np.float64]]
"""A measure's mean, and what every example contributes to it."""


def _summary(measure: Measure, seen: Seen) -> _Summary | None:
    """The summary of a measure; None if its observations were not recorded."""
    try:
        parts = measure.parts(seen)
        return None if np.isnan(parts).all() else (float(np.nanmean(parts)), parts)
    except Missing:
        return None


def _over_log_kl(points: Mapping[float, _Summary]) -> _Summary:
    """The area under a frontier over log KL, divided by its width: the mean height (trapezoidal rule)."""
    targets = sorted(points)
    widths = np.diff(np.log(targets))
    weights = (np.append(widths, 0.0) + np.append(0.0, widths)) / 2 / widths.sum() if len(widths) else np.ones(1)
    parts = [[weight * part for part in points[kl]] for kl, weight in zip(targets, weights, strict=True)]
    means, values = zip(*parts, strict=True)
    return float(sum(means)), np.sum(values, axis=0)


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
    keys: dict[str, Any] = dict(zip(KEYS, name, strict=True))
    return Record(keys, facts={"status": "failed", "error": str(read_result(file, AGAIN).get("error"))})
