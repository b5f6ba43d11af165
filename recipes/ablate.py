"""Run a grid: which ingredient produces the gain?

    python -m steertune.recipes.ablate quick --dry-run
    python -m steertune.recipes.ablate quick --folder runs/quick
    accelerate launch --multi_gpu --num_processes 2 -m steertune.recipes.ablate quick --folder runs/quick
    python -m steertune.recipes.ablate mine.toml --folder runs/mine --known runs/quick

Processes (of one launch, or started apart on the same folder) share the cells between them. A killed grid goes on
where it stopped. Cells that the folder of another grid holds (`--known`) are taken over. Then read the results with
`python -m steertune.recipes.report runs/quick`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import MutableMapping, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from steertune.recipes.ablation.bench import Bench
from steertune.recipes.ablation.cell import run_cell
from steertune.recipes.ablation.grid import Cell, Grid, load_grid
from steertune.recipes.ablation.keys import VERSION
from steertune.recipes.ablation.known import Known
from steertune.recipes.ablation.plan import plan
from steertune.recipes.ablation.tidy import read_cell
from steertune.recipes.lab import scorers
from steertune.recipes.lab.files import ArmError, write_result
from steertune.recipes.lab.processes import begin, command, positive

GRID = "grid.json"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 2 for a grid that cannot run, 1 if a cell failed."""
    options = _parser().parse_args(argv)
    rank, processes = stand_alone(os.environ)
    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        found = _ablate(options, argv, rank, processes)
    if options.json and rank == 0:
        print(json.dumps(found))
    return 1 if found["failed"] else 0


def _ablate(options: argparse.Namespace, argv: Sequence[str] | None, rank: int, processes: int) -> dict[str, Any]:
    """Run the grid that the command line names; return where it is, and how far."""
    threads = options.threads or (max(1, (os.cpu_count() or 1) // processes) if processes > 1 else None)
    disable_progress_bars()
    begin(threads, running=processes)
    grid = load_grid(options.grid, options.data_root)
    folder = options.folder or Path("runs") / grid.tables.name
    cells = grid.cells()
    check_folder(folder, cells)
    known = Known(options.known)
    bench = Bench(grid)
    for task in grid.tasks:  # refuses bad rows before anything is trained
        scorers.read(task.scorer)
        bench.splits(task)
    for task in grid.tasks if grid.tables.generations else ():
        bench.scorer(task)
    if not options.dry_run:
        known.take(cells, folder)
    elif options.known and rank == 0:
        print(f"{len(known.of(cells))} cells are known already, which count as left below.")
    if rank == 0:
        print(plan(grid, cells, bench, folder, processes, every_cell=options.dry_run))
    failed = []
    if not options.dry_run:
        write_grid(folder, grid, argv)
        failed = run(grid, cells, bench, folder, show=rank == 0)
        if rank == 0:
            print(f"Cells are in {folder}. Read them: python -m steertune.recipes.report {folder}")
    done = sum((folder / cell.path / "cell.json").exists() for cell in cells)
    return {"folder": str(folder), "cells": len(cells), "done": done, "failed": failed}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ablate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("grid", help="a .toml file or a name in recipes/configs/grids/")
    parser.add_argument("--folder", type=Path, help="where cells are kept (runs/<name of the grid>)")
    parser.add_argument(
        "--known", type=Path, action="append", default=[], help="folder of another grid, whose cells are taken over"
    )
    parser.add_argument("--data-root", type=Path, help="folder that relative task names start from")
    parser.add_argument(
        "--threads", type=positive, help="CPU threads of this process (all cores, shared by the processes)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print cells, cost and time, and stop")
    parser.add_argument(
        "--json", action="store_true", help="print how far it is in the end, all else to standard error"
    )
    return parser


def run(grid: Grid, cells: Sequence[Cell], bench: Bench, folder: Path, show: bool = True) -> list[str]:
    """Run every cell that no other runner has or does; return the titles of those that failed.

    A failed cell leaves `failed.json` and is tried again by the next start.
    """
    failed, started = [], time.time()
    todo = [cell for cell in cells if not (folder / cell.path / "cell.json").exists()]
    with tqdm(total=len(cells), initial=len(cells) - len(todo), desc="Cells", unit="cell", disable=not show) as bar:
        waiting = todo
        while waiting:
            busy = []
            for cell in waiting:
                outcome = _claimed(cell, bench, folder, started)
                if outcome == "busy":
                    busy.append(cell)
                    continue
                if outcome == "failed":
                    failed.append(cell.title)
                bar.set_postfix_str(cell.title)
                bar.update()
            if len(busy) == len(waiting):  # others are at all of them: wait for them, or for their end
                time.sleep(1.0)
            waiting = busy
    return failed


def _claimed(cell: Cell, bench: Bench, folder: Path, started: float) -> str:
    """Run a cell unless it is done, another runner is at it or it failed there since this one started. The lock ends
    with the process that holds it."""
    home = folder / cell.path
    failure = home / "failed.json"
    home.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(home / "cell.lock", timeout=0):
            if (home / "cell.json").exists():
                return "done"
            if failure.exists() and failure.stat().st_mtime >= started:
                return "failed"
            try:
                run_cell(cell, bench, folder)
            except Exception as error:  # one broken cell must not end a grid of hours
                write_result(failure, {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()})
                tqdm.write(f"{cell.title} failed: {type(error).__name__}: {error}", file=sys.stderr)
                return "failed"
            failure.unlink(missing_ok=True)
    except Timeout:
        return "busy"
    return "done"


def check_folder(folder: Path, cells: Sequence[Cell]) -> None:
    """Refuse a folder with cells that this grid would have made differently.

    Raises:
        ArmError: names the first such cell.
    """
    for cell in cells:
        file = folder / cell.path / "cell.json"
        if not file.exists():
            continue
        if read_cell(file)["key"] != cell.key:
            raise ArmError(
                f"{file} was run with other settings (arm, budget, splits, seeds[0] or measures) than this grid asks "
                "for: take another --folder."
            )


def stand_alone(environment: MutableMapping[str, str]) -> tuple[int, int]:
    """Take this process out of the group that `accelerate launch` made, since every cell runs in one process.

    Returns:
        `(rank, processes)` of the launch; `(0, 1)` without one.
    """
    rank, processes = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    if processes > 1 and (visible := torch.cuda.device_count()):
        own = int(environment.get("LOCAL_RANK", rank)) % visible
        devices = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = devices[own] if len(devices) == visible else str(own)
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


def write_grid(folder: Path, grid: Grid, argv: Sequence[str] | None) -> None:
    """Write `grid.json`, what the report needs to know of the grid; `argv` is the command that ran it."""
    folder.mkdir(parents=True, exist_ok=True)
    words = list(sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(words):
        if word in ("--data-root", "--folder", "--known"):
            words[i + 1] = word[2:].upper()  # where it is on this machine concerns nobody else
    tables = grid.tables.model_dump(mode="json")
    arms = [
        {"name": arm.name, "levels": arm.levels, "tables": arm.arm.model_dump(mode="json", exclude={"data", "output"})}
        for arm in grid.arms
    ]
    found = {
        "version": VERSION,
        "command": " ".join(["python -m steertune.recipes.ablate", *words]),
        "notes": grid.notes,
        "tables": tables,
        "arms": arms,
        "cells": {str(cell.path): cell.key for cell in grid.cells()},
    }
    with FileLock(folder / "grid.lock"):
        write_result(folder / GRID, found)


if __name__ == "__main__":
    sys.exit(main())
