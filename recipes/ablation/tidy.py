"""The cells of a grid as one table: a row a cell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from steertune.recipes.ablation.keys import VERSION
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.lab.files import ArmError, read_result

MEASURES = ("accuracy", "margin_gain", "behaviour", "moved_wrong")
"""Every one at the tuned strength, and as `matched_...` at the matched one."""
AGAIN = "Delete it, and it is run again."
_PATH = r"cells/[\w=,+-][\w=,+.-]*/n\d{1,9}/seed\d{1,10}/[\w=,+-][\w=,+.-]*"
_FORM = {
    "key": str, "task": str, "arm": str, "examples": int, "seed": int, "status": str, "levels": dict | None,
    "setting": dict | None,
}  # fmt: skip
_LISTS = ("tuning", "answers", "matched_answers", "setting", "levels")


def read_cells(folder: Path, names: list[str] | None = None) -> Frame:
    """Every cell of a folder, or those at the named paths in it.

    A diverged cell counts with what its user would be left with, the base model: its accuracy and no gain. Its
    `status` says so. Cells that failed for another reason have no numbers, and are in the table with `status` failed.

    Args:
        folder: A grid's folder.
        names: Paths of cells (as in `grid.json`); None: all that are there.

    Raises:
        ArmError: there is none, one is damaged or of another version, or a name leads out of the folder.
    """
    for name in names or ():
        if not re.fullmatch(_PATH, name, re.ASCII):
            raise ArmError(f"{name!r:.200} is no path of a cell (cells/<task>/n<examples>/seed<seed>/<arm>).")
    homes = sorted(f.parent for f in folder.rglob("cell.json")) if names is None else [folder / n for n in names]
    rows = [row for home in homes if (row := _read(home)) is not None]
    if not rows:
        raise ArmError(f"{folder} holds no cells. Run the grid first: python -m steertune.recipes.ablate")
    measures = [prefix + name for prefix in ("", "matched_") for name in MEASURES]
    cells = pd.DataFrame(rows)
    if "base_perplexity" in cells:  # which a diverged cell did not come to measure
        diverged = cells["status"] == "diverged"
        cells["base_perplexity"] = cells["base_perplexity"].fillna(cells["base_perplexity"].mean())
        cells.loc[diverged, "perplexity"] = cells.loc[diverged, "base_perplexity"]
    return cells.assign(**{name: float("nan") for name in measures if name not in cells})


def read_table(file: Path) -> Frame:
    """The same from a `cells.parquet`, where only that was kept of a grid.

    Raises:
        ArmError: it is no table of cells, or of another version.
    """
    try:
        cells = pd.read_parquet(file)
        found = set(cells["version"].dropna())
    except (OSError, ValueError, KeyError) as error:
        raise ArmError(f"{file} is no table of cells: {error}. Delete it and run the grid again.") from error
    if found != {VERSION}:
        raise ArmError(f"{file} is of version {found} of the instrument, this is {VERSION}. Run the grid again.")
    return cells


def _read(home: Path) -> dict[str, Any] | None:
    file, failed = home / "cell.json", home / "failed.json"
    if not file.exists():
        if not failed.exists():
            return None
        *_, task, n, seed, arm = home.parts
        error = read_result(failed, AGAIN).get("error")
        known = {"task": task, "examples": int(n[1:]), "seed": int(seed[4:]), "arm": arm}
        return {**known, "status": "failed", "error": str(error)}
    cell = read_cell(file)
    row = {k: v for k, v in cell.items() if k not in _LISTS}
    row |= {f"setting_{k}": v for k, v in (cell.get("setting") or {}).items()}
    row |= cell.get("levels") or {}
    if cell["status"] == "diverged":
        row |= _as_the_base(cell)
    return row


def read_cell(file: Path) -> dict[str, Any]:
    """A `cell.json`.

    Raises:
        ArmError: it is damaged, no cell, or of another version.
    """
    cell = read_result(file, AGAIN)
    if "version" not in cell:
        raise ArmError(f"{file} is no cell: it has no version. {AGAIN}")
    if cell["version"] != VERSION:
        raise ArmError(
            f"{file} is of version {cell['version']} of the instrument, this is {VERSION}: another --folder."
        )
    for name, kind in _FORM.items():
        value = cell.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ArmError(f"{file} is no cell: {name}={value!r:.80}. {AGAIN}")
    return cell


def _as_the_base(cell: dict[str, Any]) -> dict[str, Any]:
    base = {k.removeprefix("base_"): v for k, v in cell.items() if k.startswith("base_")}
    values = {**base, "margin_gain": 0.0, "moved_wrong": 0.0}
    matched = {f"matched_{name}": value for name, value in values.items()} if cell["scalable"] else {}
    return {**values, **matched, "kl": 0.0}
