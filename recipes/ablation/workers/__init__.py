"""Workers of a grid: copies of its command that share a folder, and so the cells. One file for each engine.

Every worker takes cells that no other worker is running (`ablate.run`), and a cell's lock ends with the process that
holds it. So a worker that dies loses the cell it was running, and another one takes it. An engine has to start the
copies and to know which of them are still running. They can run anywhere, as long as they see the same folder.
"""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from steertune.adapters.registry import choose, file_names
from steertune.recipes.ablation.grid import Cell
from steertune.recipes.ablation.store import Store
from steertune.recipes.lab.progress import progress

LOGS = "workers"
_POLL = 1.0  # seconds


class Workers(ABC):
    """Copies of a command.

    Args:
        command: The command.
        count: How many copies.
        threads: CPU threads of each.
        logs: Folder for what each prints, `0.log`, `1.log`, ...
    """

    @abstractmethod
    def __init__(self, command: Sequence[str], count: int, threads: int, logs: Path) -> None: ...

    @abstractmethod
    def running(self) -> int:
        """The number of workers that are still running."""

    @abstractmethod
    def stop(self) -> None:
        """Stop the workers that are still running."""


def engines() -> list[str]:
    """Names of the engines."""
    return file_names(Path(__file__).parent)


def engine_of(name: str) -> type[Workers]:
    """The engine with this name.

    Raises:
        ValueError: no engine has this name.
    """
    choose("engine", name, engines())
    return importlib.import_module(f"{__name__}.{name}").ENGINE


def run_workers(
    engine: type[Workers], command: Sequence[str], count: int, threads: int, cells: Sequence[Cell], folder: Path
) -> list[str]:
    """Run the cells that have not run in workers.

    New workers are started as long as cells are left that have neither finished nor failed, unless the last workers
    finished none.

    Args:
        engine: Starts the workers.
        command: The command that runs the grid in this folder.
        count: Number of workers.
        threads: CPU threads of each.
        cells: All cells of the grid.
        folder: The grid's folder, which all workers see.

    Returns:
        The titles of the cells that failed, or that no worker has finished.
    """
    store, started = Store(folder), time.time()
    with progress("Cells", len(cells)) as bar:
        done = _count(store, cells)
        bar.skip(done)
        while _left(cells, folder, started, store):
            before = done
            workers = engine(command, count, threads, folder / LOGS)
            try:
                while running := workers.running():
                    bar.note(f"{running} workers, logs in {folder / LOGS}")
                    time.sleep(_POLL)
                    done, last = _count(store, cells), done
                    bar.advance(done - last)
            finally:
                workers.stop()
            done, last = _count(store, cells), done
            bar.advance(done - last)
            if done == before:
                break
    store.pack()
    return [cell.title for cell in cells if not store.has(cell)]


def _count(store: Store, cells: Sequence[Cell]) -> int:
    return sum(store.has(cell) for cell in cells)


def _left(cells: Sequence[Cell], folder: Path, started: float, store: Store) -> list[Cell]:
    """Cells that have neither run nor failed since the workers started."""

    def failed(cell: Cell) -> bool:
        file = folder / cell.path / "failed.json"
        return file.exists() and file.stat().st_mtime >= started

    return [cell for cell in cells if not store.has(cell) and not failed(cell)]
