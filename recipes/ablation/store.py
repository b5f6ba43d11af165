"""Where the cells of a grid are kept: one table, `cells.parquet`, and loose files of cells that ran since.

    FOLDER/grid.json       the grid, and the key of every cell
    FOLDER/cells.parquet   the rows of all cells, written by `pack`: the part of a study that is committed
    FOLDER/cells/...       a `cell.json` for every cell that ran in this folder, or a `failed.json`
    FOLDER/tuning/...      the settings that were chosen, with all trials

A study continues from either: a cell is done if one of the two holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from steertune.recipes.ablation.grid import Cell
from steertune.recipes.ablation.old_cells import is_old, record_of, records_of_table
from steertune.recipes.lab.files import ArmError, read_result, write_result
from steertune.recipes.lab.rows import AGAIN, COLUMNS, KEYS, Record, from_table, to_table

TABLE = "cells.parquet"


class Store:
    """The cells of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def packed(self) -> dict[tuple[Any, ...], Record]:
        """The cells in the table, by arm, task, number of examples and seed.

        Raises:
            ArmError: it is not a table of cells.
        """
        file = self.folder / TABLE
        return {name_of(record): record for record in read_table(file)} if file.is_file() else {}

    def file(self, cell: Cell) -> Path:
        """The file of a cell that has run."""
        return self.folder / cell.path / "cell.json"

    def get(self, cell: Cell) -> Record | None:
        """A cell that ran; None if it has not.

        Raises:
            ArmError: its file is damaged or not a cell.
        """
        if self.file(cell).exists():
            return read_cell(self.file(cell))
        return self.packed.get(tuple(cell.keys.values()))

    def has(self, cell: Cell) -> bool:
        """Whether a cell ran."""
        return self.file(cell).exists() or self.get(cell) is not None

    def check(self, cells: Sequence[Cell]) -> None:
        """Refuse a folder with cells that this grid would have made differently.

        Raises:
            ArmError: names the first such cell.
        """
        for cell in cells:
            record = self.get(cell)
            if record is not None and record.facts.get("key") != cell.key:
                raise ArmError(
                    f"{self.file(cell)} was run with other settings (arm, budget, splits, seeds[0] or measures) than "
                    "this grid asks for. Choose another --folder."
                )

    def pack(self) -> None:
        """Write the table of all cells, with the cells of an older table. Loose files stay."""
        with FileLock(self.folder / "pack.lock"):
            self.__dict__.pop("packed", None)  # another process may have packed since
            records = {**self.packed, **{name_of(record): record for record in self.loose()}}
            if not records:
                return
            part = (self.folder / TABLE).with_suffix(".part")
            to_table([*records.values()]).to_parquet(part, index=False)
            part.replace(self.folder / TABLE)

    def loose(self) -> list[Record]:
        """The cells that are stored as loose files.

        Raises:
            ArmError: a file is damaged or not a cell.
        """
        return [read_cell(file) for file in sorted((self.folder / "cells").rglob("cell.json"))]

    @property
    def is_empty(self) -> bool:
        """Whether no cell has run. The cells are not read."""
        return not (self.folder / TABLE).is_file() and not any((self.folder / "cells").rglob("cell.json"))

    def records(self) -> list[Record]:
        """Every cell that ran."""
        return [*{**self.packed, **{name_of(record): record for record in self.loose()}}.values()]


class Reusable:
    """Cells and tunings of other grids, so that what two grids share is computed only once.

    Raises:
        ArmError: a folder holds no cells, or a damaged file.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._cells: dict[str, Record] = {}
        self._tunings: dict[str, dict[str, Any]] = {}
        for folder in folders:
            records = Store(folder).records()
            if not records:
                raise ArmError(f"--reuse {folder}: it holds no cells. Name a folder in which a grid was run.")
            self._cells |= {record.facts["key"]: record for record in records}
            # a committed table holds the tunings with the cells that used them
            self._tunings |= {tuning["key"]: tuning for record in records if (tuning := tuning_of(record)) is not None}
            files = sorted((folder / "tuning").rglob("*.json"))
            self._tunings |= {str(tuning.get("key")): tuning for tuning in (read_result(f, AGAIN) for f in files)}

    def of(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells that need not run."""
        return [cell for cell in cells if cell.key in self._cells]

    def take(self, cells: Sequence[Cell], folder: Path) -> None:
        """Write the cells and tunings that a grid shares with these folders into its own folder, unless they exist or
        another runner is working on them. A cell can have a different name in another grid."""
        store = Store(folder)
        for cell in cells:
            if cell.key in self._cells and not store.has(cell):
                record = self._cells[cell.key]
                facts = {**record.facts, "taken_over": True}  # it ran before this grid's card was written
                _write(folder / cell.path / "cell.json", Record(cell.keys, record.observations, facts).write)
            if cell.tuning_key in self._tunings and not (folder / cell.tuning_file).exists():
                tuning = self._tunings[cell.tuning_key]
                _write(folder / cell.tuning_file, lambda file, tuning=tuning: write_result(file, tuning))


def read_cell(file: Path) -> Record:
    """A `cell.json`, of this version or of an older one.

    Raises:
        ArmError: it is damaged or not a cell.
    """
    content = read_result(file, AGAIN)
    record = record_of(content, str(file)) if is_old(content) else Record.from_json(content, file)
    for name in ("key", "status"):
        if not isinstance(record.facts.get(name), str):
            raise ArmError(f"{file} is not a cell: {name}={record.facts.get(name)!r:.80}. {AGAIN}")
    return record


def read_table(file: Path) -> list[Record]:
    """The cells of a `cells.parquet`, of this version or of an older one.

    Raises:
        ArmError: it is not a table of cells.
    """
    try:
        table = pd.read_parquet(file)
        return from_table(table) if set(COLUMNS) <= set(table.columns) else records_of_table(table)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArmError(f"{file} is not a table of cells: {error}. Delete it and run the grid again.") from error


def tuning_of(record: Record) -> dict[str, Any] | None:
    """The tuning that a cell's settings come from, as its file holds it."""
    facts = record.facts
    if not facts.get("tuning_key") or facts.get("tuning") is None:
        return None
    seconds = facts.get("tuning_seconds", 0.0)
    return {"key": facts["tuning_key"], "trials": facts["tuning"], "best": facts.get("setting"), "seconds": seconds}


def name_of(record: Record) -> tuple[Any, ...]:
    """The name of a cell: arm, task, number of examples, seed."""
    return tuple(record.keys[name] for name in KEYS)


def _write(file: Path, write: Any) -> None:
    """Write a file while holding its lock; skip it if another process holds the lock."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file.with_suffix(".lock"), timeout=0, blocking=False)
    try:
        with lock:
            if not file.exists():
                write(file)
    except TimeoutError:
        return
