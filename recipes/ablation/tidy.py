"""The cells of a grid as one table: a row a cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from steertune.recipes.ablation.grid import VERSION
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.arm import ArmError

MEASURES = ("accuracy", "margin_gain", "behaviour", "moved_wrong")
"""Every one at the tuned strength, and as `matched_...` at the matched one."""
_LISTS = ("tuning", "answers", "matched_answers", "setting", "levels")


def read_cells(folder: Path, names: list[str] | None = None) -> Frame:
    """Every cell of a folder, or those at the named paths in it.

    A diverged cell counts with what its user would be left with, the base model: its accuracy and no gain. Its
    `status` says so. Cells that failed for another reason have no numbers, and are in the table with `status` failed.

    Args:
        folder: A grid's folder.
        names: Paths of cells (as in `grid.json`); None: all that are there.

    Raises:
        ArmError: there is none, or one is of another version.
    """
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


def _read(home: Path) -> dict[str, Any] | None:
    file, failed = home / "cell.json", home / "failed.json"
    if not file.exists():
        if not failed.exists():
            return None
        *_, task, n, seed, arm = home.parts
        error = json.loads(failed.read_text(encoding="utf-8"))["error"]
        known = {"task": task, "examples": int(n[1:]), "seed": int(seed[4:]), "arm": arm}
        return {**known, "status": "failed", "error": error}
    try:
        cell = json.loads(file.read_text(encoding="utf-8"))
        version = cell["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArmError(f"{file} is no cell ({error!r}). Delete it, and it is run again.") from error
    if version != VERSION:
        raise ArmError(f"{file} is of version {version} of the instrument, this is {VERSION}: run the grid again.")
    row = {k: v for k, v in cell.items() if k not in _LISTS}
    row |= {f"setting_{k}": v for k, v in (cell["setting"] or {}).items()}
    row |= cell["levels"] or {}
    if cell["status"] == "diverged":
        row |= _as_the_base(cell)
    return row


def _as_the_base(cell: dict[str, Any]) -> dict[str, Any]:
    base = {k.removeprefix("base_"): v for k, v in cell.items() if k.startswith("base_")}
    values = {**base, "margin_gain": 0.0, "moved_wrong": 0.0}
    matched = {f"matched_{name}": value for name, value in values.items()} if cell["scalable"] else {}
    return {**values, **matched, "kl": 0.0}
