"""Run a grid: which ingredient produces the gain?

    python -m steertune.recipes.ablate quick --dry-run
    python -m steertune.recipes.ablate quick --folder runs/quick
    python -m steertune.recipes.ablate quick --folder runs/quick --workers 2
    accelerate launch --multi_gpu --num_processes 2 -m steertune.recipes.ablate quick --folder runs/quick
    python -m steertune.recipes.ablate mine.toml --folder runs/mine --reuse runs/quick

Several processes can share the cells: `--workers` (on a cluster with `--engine ray`), the processes of one launch, or
any that are started separately on the same folder. A process that dies loses only the cell it was running. A killed
grid continues where it stopped, from its `cells.parquet` and the cells that ran since. Both are in the folder; of a
long study, commit the table. Cells found in the folder of another grid (`--reuse`) are not run again. Then read the
results with `python -m steertune.recipes.report runs/quick`.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
from filelock import FileLock, Timeout
from trl import DPOConfig

from steertune.recipes.ablation.context import Context
from steertune.recipes.ablation.grid import Cell, Grid, load_grid
from steertune.recipes.ablation.keys import VERSION
from steertune.recipes.ablation.looks import GRID, fixed
from steertune.recipes.ablation.plan import plan
from steertune.recipes.ablation.rehearsal import rehearse_grid
from steertune.recipes.ablation.run import run_cell
from steertune.recipes.ablation.store import TABLE, Reusable, Store
from steertune.recipes.ablation.workers import engine_of, run_workers
from steertune.recipes.lab import scorers
from steertune.recipes.lab.checks import check_adapters, check_training
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.cut_answers import too_short
from steertune.recipes.lab.files import ArmError, write_result
from steertune.recipes.lab.options import Argument, Choice, Count, Option, Threads, grid_names
from steertune.recipes.lab.pair_lint import warn_of
from steertune.recipes.lab.paths import modules_in, without_paths
from steertune.recipes.lab.processes import begin, default_threads
from steertune.recipes.lab.progress import Bar, progress
from steertune.recipes.lab.secrets import masked

_PACK_SECONDS = 600


@command
def main(
    grid: Annotated[str, Argument(help="a .toml file or a name in recipes/configs/grids/", autocompletion=grid_names)],
    folder: Annotated[Path | None, Option(help="folder of the cells (runs/<name of the grid>)")] = None,
    reuse: Annotated[
        list[Path] | None, Option("--reuse", "--known", help="folders of other grids with the same cells")
    ] = None,
    data_root: Annotated[Path | None, Option(help="folder that relative task names refer to")] = None,
    threads: Threads = None,
    workers: Annotated[int, Count("processes that share the cells")] = 1,
    engine: Annotated[str, Choice(modules_in("recipes/ablation/workers"), "what runs several workers")] = "local",
    dry_run: Annotated[bool, Option("--dry-run", help="print cells, cost and time, and stop")] = False,
    words: Sequence[str] = (),
) -> Result | int:
    """Run the grid; the exit code is 1 if a cell failed."""
    rank, processes = stand_alone(os.environ)
    if workers > 1 and processes > 1:
        raise ArmError(f"--workers {workers} within a launch of {processes} processes. Use one of the two.")
    begin(threads, running=processes)
    loaded = load_grid(grid, data_root)
    folder = folder or Path("runs") / loaded.tables.name
    cells = loaded.cells()
    # the folder's own table has the tuning results that further seeds need
    this_folder = [folder] if (folder / TABLE).is_file() else []
    store, reusable, context = Store(folder), Reusable([*(reuse or ()), *this_folder]), Context(loaded)
    store.check(cells)
    fixed(loaded, folder)  # refuses a card that differs from that of the cells
    _check(loaded, context, show=rank == 0)
    if not dry_run:
        write_grid(folder, loaded, words)  # before the first cell, since it fixes the card
        reusable.take(cells, folder)
    elif reuse and rank == 0:
        print(f"{len(reusable.of(cells))} cells can be reused; below, they are counted as left.")
    # refuse here what would fail in a cell, also in dry runs
    notes = rehearse_grid([cell for cell in cells if not store.has(cell)], context)
    if rank == 0:
        print("\n".join(notes) + "\n" * bool(notes), end="")
        print(plan(loaded, cells, context, folder, max(processes, workers), every_cell=dry_run))
    failed = []
    if not dry_run:
        if workers == 1:
            failed = run(cells, context, folder, show=rank == 0)
        else:
            del context  # and the model: every worker loads its own
            each = threads or default_threads(running=workers)
            failed = run_workers(engine_of(engine), worker_command(words, folder, each), workers, each, cells, folder)
    code = 1 if failed else 0
    done = sum(store.has(cell) for cell in cells)
    data = {"folder": str(folder), "cells": len(cells), "done": done, "failed": failed}
    text = "" if dry_run else f"Cells are in {folder}. Read them: steertune report {folder}"
    return Result(data, text, code) if rank == 0 else code


def _check(grid: Grid, context: Context, show: bool) -> None:
    """Refuse bad rows before the model is loaded, then arms that cannot be trained and scorers that do not work."""
    for task in grid.tasks:
        scorers.read(task.scorer)
        splits = context.read(task)
        if splits.note:
            grid.notes.append(f"{task.label}: {splits.note}")
        if show:
            warn_of(splits.pool, splits.by, task.label)
    for arm in grid.arms:
        check_training(arm.arm, DPOConfig)
    check_adapters([arm.arm for arm in grid.arms])
    for task in grid.tasks if grid.tables.generations else ():
        scorer = context.scorer(task)
        finding = too_short(context.splits(task).test, scorer, context.tokenizer, grid.tables.new_tokens)
        if finding is not None:
            grid.notes.append(f"{task.label}: {finding.text}")


def worker_command(words: Sequence[str], folder: Path, threads: int) -> list[str]:
    """The command line of one worker, from the command line that started several."""
    rest, words = [], list(words)
    while words:
        word = words.pop(0)
        name, has_value, _ = word.partition("=")
        if name not in ("--workers", "--engine", "--folder", "--threads"):
            rest.append(word)
        elif not has_value:
            words.pop(0)
    options = ["--folder", str(folder), "--threads", str(threads)]
    return [sys.executable, "-m", "steertune.recipes.ablate", *rest, *options]


def run(cells: Sequence[Cell], context: Context, folder: Path, show: bool = True) -> list[str]:
    """Run every cell that is not done and not being run by another process.

    A failed cell leaves `failed.json` and is tried again at the next start. The table of all cells is written every
    few minutes and at the end.

    Returns:
        The titles of the cells that failed.
    """
    failed, started, store = [], time.time(), Store(folder)
    todo, packed = [cell for cell in cells if not store.has(cell)], time.monotonic()
    with progress("Cells", len(cells), show) as bar:
        bar.skip(len(cells) - len(todo))
        waiting = todo
        while waiting:
            busy = []
            for cell in waiting:
                outcome = _claimed(cell, context, folder, started, bar)
                if outcome == "busy":
                    busy.append(cell)
                    continue
                if outcome == "failed":
                    failed.append(cell.title)
                if time.monotonic() - packed > _PACK_SECONDS:
                    store.pack()
                    packed = time.monotonic()
            # other processes are running all remaining cells: wait until they finish or die
            if len(busy) == len(waiting):
                time.sleep(1.0)
            waiting = busy
    store.pack()
    return failed


def _claimed(cell: Cell, context: Context, folder: Path, started: float, bar: Bar) -> str:
    """Run a cell unless it is done, is being run by another process, or failed since this process started. The lock is
    released when the process that holds it ends."""
    home = folder / cell.path
    failure = home / "failed.json"
    home.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(home / "cell.lock", timeout=0):
            if (home / "cell.json").exists():
                bar.skip()
                return "done"
            if failure.exists() and failure.stat().st_mtime >= started:
                bar.skip()
                return "failed"
            try:
                with bar.step(cell.title):
                    run_cell(cell, context, folder)
            except Exception as error:  # one broken cell must not end a grid of hours
                reason = masked(f"{type(error).__name__}: {error}")
                write_result(failure, {"error": reason, "trace": masked(traceback.format_exc())})
                bar.say(f"{cell.title} failed: {reason}")
                return "failed"
            failure.unlink(missing_ok=True)
    except Timeout:
        return "busy"
    return "done"


def stand_alone(environment: MutableMapping[str, str]) -> tuple[int, int]:
    """Take this process out of the group that `accelerate launch` made, since every cell runs in one process.

    Returns:
        `(rank, processes)` of the launch; `(0, 1)` without one.
    """
    rank, processes = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    if processes > 1 and (visible := torch.cuda.device_count()):
        device = int(environment.get("LOCAL_RANK", rank)) % visible
        devices = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = devices[device] if len(devices) == visible else str(device)
    for name in [*environment]:
        if name in (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
        ) or name.startswith(("ACCELERATE_USE_", "FSDP_", "TORCHELASTIC_")):
            del environment[name]
    return rank, processes


def write_grid(folder: Path, grid: Grid, words: Sequence[str]) -> None:
    """Write `grid.json` with what the report needs to know about the grid; `words` is the command line."""
    folder.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m steertune.recipes.ablate", *without_paths(words)])
    with FileLock(folder / "grid.lock"):
        content = {"version": VERSION, "command": command, **fixed(grid, folder), **grid.to_json()}
        write_result(folder / GRID, content)


if __name__ == "__main__":
    sys.exit(main())
