"""What `test_crashes.py` runs in processes of their own, which are killed at some moment."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tiny_data import history, pairs, trainer
from tiny_grids import read, results

import steertune.recipes.ablate as recipe
from steertune.recipes.ablation.context import Context
from steertune.recipes.ablation.grid import Grid, make_grid
from steertune.recipes.ablation.store import Store
from steertune.trainers import FrozenPrefix, last_checkpoint

_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


def run(case: str, folder: Path, event: int | None, started: Any) -> None:
    """Run a case to its end. With an `event`, the process kills itself before that many changes to its folder."""
    CASES[case].load(folder)  # imports and data, which are no moment of interest
    if event is not None:
        _kill_at(event, folder)
    started.set()
    CASES[case].run(folder)


def _kill_at(event: int, folder: Path) -> None:
    left = event

    def count(name: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        reads = name == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wax+"))
        if name in _EVENTS and not reads and str(args[0]).startswith(str(folder)):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


class Training:
    """BiPO (it draws random strengths) with a checkpoint every step and a memo in a folder, to an adapter."""

    @staticmethod
    def load(folder: Path) -> Any:
        folder.mkdir(parents=True, exist_ok=True)
        return trainer(
            "dpo", folder / "out", data=pairs(24), loss="bipo", max_steps=10, save_strategy="steps", save_steps=1,
            save_total_limit=3, frozen_prefix=FrozenPrefix(ram_gb=0, folder=folder / "memo"),
        )  # fmt: skip

    @staticmethod
    def run(folder: Path) -> None:
        made = Training.load(folder)
        made.train(resume_from_checkpoint=last_checkpoint(folder / "out"))
        made.save_model(str(folder / "adapter"))
        (folder / "done.json").write_text(json.dumps(history(made)))

    @staticmethod
    def result(folder: Path) -> Any:
        """Every logged number but timings, and the vector, bit for bit."""
        tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
        logged = [entry for entry in json.loads((folder / "done.json").read_text()) if "train_loss" not in entry]
        return logged, {name: value.tolist() for name, value in tensors.items()}


class GridRun:
    """Two arms, two seeds: four cells, with tuning that the seeds share."""

    @staticmethod
    def grid(folder: Path) -> Grid:
        tables = json.loads((folder.parent / "tables.json").read_text())
        return make_grid(tables)

    @staticmethod
    def load(folder: Path) -> None:
        GridRun.grid(folder)

    @staticmethod
    def run(folder: Path) -> None:
        grid = GridRun.grid(folder)
        Store(folder).check(grid.cells())
        failed = recipe.run(grid.cells(), Context(grid), folder, show=False)
        assert not failed

    @staticmethod
    def result(folder: Path) -> Any:
        """Every cell, without what depends on the clock."""
        return results(read(GridRun.grid(folder), folder))


CASES: dict[str, Any] = {"training": Training, "grid": GridRun}
