"""What a grid costs, against the same cells run one by one with TRL's trainers and PEFT.

    python -m steertune.recipes.studies.benchmark_grid quick --folder runs/benchmark_grid

Every arm's first cell is timed both ways, its tuning and the rest apart, since later cells do not repeat the tuning;
the rest of the grid is extrapolated from them. Both ways take the same trials, steps and evaluations. Stock means:
TRL's own DPO loss where the arm compares pairs, and nothing kept between forward passes or cells. What both ways need
once, the base model's own scores, is not counted. Stock is not made to run the head on all tokens when it evaluates,
nor where an arm trains on the chosen answers alone. It need not load the model anew for every training either; the
last column is what it comes to if it does. With one thread on a CPU, seconds are CPU seconds of this process. Writes
`grid.md`.
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
from steertune.recipes.lab.arm import UPSTREAM
from steertune.recipes.lab.command_line import Argument, Option, Result, Threads, command
from steertune.recipes.lab.data import load_model
from steertune.recipes.lab.evaluate import evaluate_base
from steertune.recipes.lab.files import ArmError, write_whole
from steertune.recipes.lab.observe import HeldOut
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import progress
from steertune.recipes.lab.tables import ModelTable
from steertune.recipes.studies.timing.ways import now


class StockContext(Context):
    """A context that leaves nothing out: forward passes run all layers."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.prefix: Any = False

    def _make_held_out(self, label: str) -> HeldOut:
        return dataclasses.replace(super()._make_held_out(label), prefix=None)


@command
def main(
    grid: Annotated[str, Argument(help="a .toml file or a name in recipes/configs/grids/")],
    folder: Annotated[Path, Option(help="where the table is written")] = Path("runs/benchmark_grid"),
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
    folder.mkdir(parents=True, exist_ok=True)
    text = page(loaded, seconds, loading(loaded), grid, arms)
    write_whole(folder / "grid.md", text)
    return Result(seconds, text)


def loading(grid: Grid) -> float:
    """Seconds that loading the model takes."""
    start = now()
    load_model(ModelTable(**grid.tables.model))
    return now() - start


def measure(grid: Grid, arms: Sequence[str] | None = None) -> dict[str, dict[str, list[float]]]:
    """Seconds of an arm's first cell, without its tuning, and the trainings of its tuning: arm -> `ours` or `stock` ->
    these numbers."""
    first = grid.cells()[0]
    where = (first.task, first.examples, first.seed)
    cells = [cell for cell in grid.cells() if (cell.task, cell.examples, cell.seed) == where]
    cells = [cell for cell in cells if arms is None or cell.arm.name in arms]
    found: dict[str, dict[str, list[float]]] = {cell.arm.name: {} for cell in cells}
    contexts = {"ours": Context(grid), "stock": StockContext(grid)}
    for context in contexts.values():
        evaluate_base(context.held_out(first.task))
    with tempfile.TemporaryDirectory() as folder, progress("Cells", 2 * len(cells)) as bar:
        for cell in cells:
            for way, context in contexts.items():
                own, home = cell if way == "ours" else _stock(cell), Path(folder) / way
                with bar.step(f"{way}: {cell.title}"):
                    start = now()
                    trials = len(tuned(own, context, home)["trials"])
                    tuning = now() - start
                    run_cell(own, context, home)
                    found[cell.arm.name][way] = [now() - start, now() - start - tuning, trials]
    return found


def _stock(cell: Cell) -> Cell:
    """The cell with TRL's own loss; a loss that TRL does not have (pairs without contrast) stays."""
    arm = cell.arm.arm
    if arm.loss.get("contrast", "paired") == "paired" and arm.trainer.get("max_steps") != 0:
        arm = arm.model_copy(update={"loss": {"name": UPSTREAM}})
    return dataclasses.replace(cell, arm=dataclasses.replace(cell.arm, arm=arm))


def page(
    grid: Grid, found: dict[str, dict[str, list[float]]], load: float, name: str, timed: Sequence[str] | None
) -> str:
    """The table."""
    t = grid.tables
    places = len(t.tasks) * len(t.examples)
    count = places * len(t.seeds)
    tunings = {"grid": 1, "arm": places}.get(t.budget.per, count)

    def whole(cells: list[float], load: float = 0.0) -> float:
        first, rest = cells[0] + load * (cells[2] + 1), cells[1] + load
        return tunings * first + (count - tunings) * rest

    totals = {way: sum(whole(arm[way]) for arm in found.values()) for way in ("ours", "stock")}
    loads = sum(whole(arm["stock"], load) for arm in found.values())
    arms = "" if timed is None else f" --arms {shlex.join(timed)}"
    clock = "CPU seconds" if torch.get_num_threads() == 1 and not torch.cuda.is_available() else "Seconds"
    lines = [
        f"# What the grid {name} costs, against the same cells run one by one with TRL and PEFT",
        "",
        f"`steertune benchmark_grid {name} --threads {torch.get_num_threads()}{arms}`, "
        f"torch {torch.__version__}. {clock}. One cell an arm was timed, one way after the other, and all its {count} "
        f"cells, of which {tunings} tune, are extrapolated from it. Loading the model takes {load:.1f} s.",
        "",
        "| arm | ours, s (first, later) | stock, s (first, later) | all its cells: stock over ours "
        "| and with a model loaded for every training of stock |",
        "|---|---|---|---|---|",
    ]
    for arm, ways in found.items():
        cells = {way: " ".join(f"{s:.0f}" for s in seconds[:2]) for way, seconds in ways.items()}
        ratios = [whole(ways["stock"], each) / whole(ways["ours"]) for each in (0.0, load)]
        lines.append(f"| {arm} | {cells['ours']} | {cells['stock']} | {ratios[0]:.1f} | {ratios[1]:.1f} |")
    lines += [
        f"| all, extrapolated | {totals['ours']:.0f} | {totals['stock']:.0f} "
        f"| {totals['stock'] / totals['ours']:.1f} | {loads / totals['ours']:.1f} |"
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
