"""Cells and tunings that another grid's folder holds already: what overlaps is paid for once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from steertune.recipes.ablation.grid import Cell
from steertune.recipes.ablation.tidy import AGAIN, read_cell
from steertune.recipes.lab.files import ArmError, read_result, write_result


class Known:
    """What folders of other grids hold, by the hash of everything that decides it.

    Args:
        folders: Folders that `ablate` ran a grid in.

    Raises:
        ArmError: one holds no cells, or a damaged file.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._cells: dict[str, dict[str, Any]] = {}
        self._tunings: dict[str, dict[str, Any]] = {}
        for folder in folders:
            files = sorted((folder / "cells").rglob("cell.json"))
            if not files:
                raise ArmError(f"--known {folder}: no cells in it. Name a folder that a grid was run in.")
            self._cells |= {cell["key"]: cell for cell in map(read_cell, files)}
            tunings = [read_result(file, AGAIN) for file in sorted((folder / "tuning").rglob("*.json"))]
            self._tunings |= {str(tuning.get("key")): tuning for tuning in tunings}

    def of(self, cells: Sequence[Cell]) -> list[Cell]:
        """Those cells that are known."""
        return [cell for cell in cells if cell.key in self._cells]

    def take(self, cells: Sequence[Cell], folder: Path) -> None:
        """Write what is known of a grid's cells and tunings into its folder, where it is not there yet and no other
        runner is at it. What a cell is called may differ between grids."""
        for cell in cells:
            names = {"arm": cell.arm.name, "levels": cell.arm.levels}
            home, tuning = folder / cell.path, folder / cell.tuning_file
            if cell.key in self._cells:
                _write(home / "cell.json", {**self._cells[cell.key], **names})
            if cell.tuning_key in self._tunings:
                _write(tuning, self._tunings[cell.tuning_key])


def _write(file: Path, found: dict[str, Any]) -> None:
    """Write a result under the lock that whoever makes it holds."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with suppress(Timeout), FileLock(file.with_suffix(".lock"), timeout=0):
        if not file.exists():
            write_result(file, found)
