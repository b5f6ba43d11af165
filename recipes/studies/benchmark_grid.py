"""What a grid costs, compared with running the same cells one by one with TRL's trainers and PEFT.

    python -m steertune.recipes.studies.benchmark_grid quick --folder runs/benchmark_grid

Both ways run the same trials, steps and evaluations. "Stock" uses TRL's own DPO loss where the arm compares pairs, and
keeps nothing between forward passes or between cells. Each arm's first cell is timed both ways, and its tuning
separately, because later cells do not repeat the tuning. The cost of the whole grid is extrapolated from these
cells. The base model's own scores are needed once either way and are not counted.

Three choices favour stock: its evaluations do not run the head on every token, neither does its training of arms that
use only the chosen answers, and the model is not loaded again for every training. The last column shows the ratio with
such a load. With one thread on a CPU, seconds are CPU seconds of this process. Writes `grid.md`.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch

from steertune.recipes.ablation.context import Context
from steertune.recipes.ablation.grid import Cell, Grid, load_grid
from steertune.recipes.ablation.run import run_cell, tuned
from steertune.recipes.ablation.tables import TaskTable
from steertune.recipes.lab.arm import UPSTREAM
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.data import load_model
from steertune.recipes.lab.evaluate import evaluate_base
from steertune.recipes.lab.files import ArmError, write_whole
from steertune.recipes.lab.observe import HeldOut
from steertune.recipes.lab.options import Argument, Option, Threads
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import progress
from steertune.recipes.lab.tables import ModelTable
from steertune.recipes.studies.timing.ways import now


class StockContext(Context):
    """A context without any cache: every forward pass runs all layers."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.prefix: Any = False

    def held_out(self, task: TaskTable) -> HeldOut:
        """Like the parent's, but without the cached prefix."""
        return dataclasses.replace(super().held_out(task), prefix=None)


@command
def main(
    grid: Annotated[str, Argument(help="a .toml file or a name in recipes/configs/grids/")],
    folder: Annotated[Path, Option(help="where grid.md is written")] = Path("runs/benchmark_grid"),
    data_root: Annotated[Path | None, Option(help="folder that relative task names start from")] = None,
    arms: Annotated[list[str] | None, Option(help="names of the arms to time (all)", metavar="NAME ...")] = None,
    threads: Threads = None,
) -> Result:
    """Time a cell of every arm both ways, and write the table."""
    begin(threads, only_one=True)
    loaded = load_grid(grid, data_root)
    if unknown := set(arms or ()) - {arm.name for arm in loaded.arms}:
        raise ArmError(f"--arms {sorted(unknown)}: the grid has {[arm.name for arm in loaded.arms]}.")
    seconds = measure(loaded, arms)
    start = now()
    load_model(ModelTable(**loaded.tables.model))
    text = page(loaded, seconds, now() - start, grid, arms)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "grid.md", text)
    return Result(seconds, text)


def measure(grid: Grid, arms: Sequence[str] | None = None) -> dict[str, dict[str, list[float]]]:
    """Time every arm's first cell both ways. Without `arms`, all are timed.

    Returns:
        arm -> `ours` or `stock` -> seconds of the cell with its tuning, seconds without it, and the number of
        trainings in the tuning.
    """
    first = grid.cells()[0]
    place = (first.task, first.examples, first.seed)
    cells = [cell for cell in grid.cells() if (cell.task, cell.examples, cell.seed) == place]
    cells = [cell for cell in cells if arms is None or cell.arm.name in arms]
    contexts = {"ours": Context(grid), "stock": StockContext(grid)}
    # what both ways compute once stays outside the clock
    for context in contexts.values():
        evaluate_base(context.held_out(first.task))
    seconds: dict[str, dict[str, list[float]]] = {cell.arm.name: {} for cell in cells}
    with tempfile.TemporaryDirectory() as folder, progress("Cells", 2 * len(cells)) as bar:
        for cell in cells:
            for way, context in contexts.items():
                timed, home = cell if way == "ours" else _stock(cell), Path(folder) / way
                with bar.step(f"{way}: {cell.title}"):
                    start = now()
                    trials = len(tuned(timed, context, home)["trials"])
                    tuning = now() - start
                    run_cell(timed, context, home)
                    total = now() - start
                seconds[cell.arm.name][way] = [total, total - tuning, trials]
    return seconds


def _stock(cell: Cell) -> Cell:
    """The cell with TRL's own loss where TRL has it: not for arms that train without contrast."""
    arm = cell.arm.arm
    if arm.loss.get("contrast", "paired") == "paired" and arm.trainer.get("max_steps") != 0:
        arm = arm.model_copy(update={"loss": {"name": UPSTREAM}})
    return dataclasses.replace(cell, arm=dataclasses.replace(cell.arm, arm=arm))


def page(
    grid: Grid, seconds: dict[str, dict[str, list[float]]], load: float, name: str, timed: Sequence[str] | None
) -> str:
    """The table in Markdown. `load` is the seconds that loading the model takes, `name` is how the command line names
    the grid."""
    t = grid.tables
    places = len(t.tasks) * len(t.examples)
    count = places * len(t.seeds)
    tunings = {"grid": 1, "arm": places}.get(t.budget.per, count)

    def whole(cell: list[float], load: float = 0.0) -> float:
        """Seconds of all cells of an arm: those that tune, and the rest."""
        tuning, later, trials = cell
        return tunings * (tuning + load * (trials + 1)) + (count - tunings) * (later + load)

    totals = {way: sum(whole(ways[way]) for ways in seconds.values()) for way in ("ours", "stock")}
    with_loads = sum(whole(ways["stock"], load) for ways in seconds.values())
    arms = "" if timed is None else f" --arms {shlex.join(timed)}"
    clock = "CPU seconds" if torch.get_num_threads() == 1 and not torch.cuda.is_available() else "Seconds"
    lines = [
        f"# What the grid {name} costs, compared with the same cells run one by one with TRL and PEFT",
        "",
        f"`steertune benchmark_grid {name} --threads {torch.get_num_threads()}{arms}`, "
        f"torch {torch.__version__}. {clock}. One cell per arm was timed both ways; the cost of all its {count} "
        f"cells, {tunings} of which tune, is extrapolated from it. Loading the model takes {load:.1f} s.",
        "",
        "| arm | ours, s (first cell, later cells) | stock, s (first cell, later cells) | all cells: stock / ours "
        "| the same if stock loads the model for every training |",
        "|---|---|---|---|---|",
    ]
    for arm, ways in seconds.items():
        ours, stock = (" ".join(f"{s:.0f}" for s in ways[way][:2]) for way in ("ours", "stock"))
        ratios = [whole(ways["stock"], each) / whole(ways["ours"]) for each in (0.0, load)]
        lines.append(f"| {arm} | {ours} | {stock} | {ratios[0]:.1f} | {ratios[1]:.1f} |")
    lines.append(
        f"| all, extrapolated | {totals['ours']:.0f} | {totals['stock']:.0f} "
        f"| {totals['stock'] / totals['ours']:.1f} | {with_loads / totals['ours']:.1f} |"
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
