"""What a grid costs, against the same cells run one by one with TRL's trainers and PEFT.

    python -m steertune.recipes.benchmark_grid quick --folder runs/benchmark_grid

Every arm's first cell is timed both ways, and the time of its tuning apart, which later seeds do not repeat; the rest
of the grid is extrapolated from them. Stock means: TRL's own DPO loss where the arm compares pairs, and nothing
kept between forward passes or cells. What both ways need once, the base model's own scores and the loading of the
model, is not counted, nor is stock made to run the head on all tokens when it evaluates. Writes `grid.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from tqdm.auto import tqdm

from steertune.recipes.ablation.bench import Bench
from steertune.recipes.ablation.cell import run_cell
from steertune.recipes.ablation.grid import Cell, Grid, load_grid
from steertune.recipes.arm import UPSTREAM
from steertune.recipes.processes import begin, command, positive
from steertune.recipes.training import write_whole


class StockBench(Bench):
    """A bench that leaves nothing out."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.prefix: Any = False

    @contextmanager
    def remembering(self, model: Any) -> Iterator[None]:
        """Forward passes inside run all layers."""
        yield


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="benchmark_grid", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("grid", help="a .toml file or a name in recipes/grids/")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_grid"))
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--threads", type=positive)
    options = parser.parse_args(argv)
    disable_progress_bars()
    begin(options.threads, only_one=True)
    grid = load_grid(options.grid, options.data_root)
    found = measure(grid)
    options.folder.mkdir(parents=True, exist_ok=True)
    text = page(grid, found, options.grid)
    write_whole(options.folder / "grid.md", text)
    print(text)
    return 0


def measure(grid: Grid) -> dict[str, dict[str, list[float]]]:
    """Seconds of every arm's first cell, and without its tuning: arm -> `ours` or `stock` -> two numbers."""
    first = grid.cells()[0]
    where = (first.task, first.examples, first.seed)
    cells = [cell for cell in grid.cells() if (cell.task, cell.examples, cell.seed) == where]
    found: dict[str, dict[str, list[float]]] = {arm.name: {} for arm in grid.arms}
    benches = {"ours": Bench(grid), "stock": StockBench(grid)}
    for bench in benches.values():
        bench.base_measures(first.task)
        assert bench.neutral
    with tempfile.TemporaryDirectory() as folder, tqdm(total=2 * len(cells), unit="cell") as bar:
        for cell in cells:
            for way, bench in benches.items():
                bar.set_postfix_str(f"{way}: {cell.title}")
                ran = run_cell(cell if way == "ours" else _stock(cell), bench, Path(folder) / way)
                found[cell.arm.name][way] = [ran["seconds"], ran["seconds"] - ran["tuning_seconds"]]
                bar.update()
    return found


def _stock(cell: Cell) -> Cell:
    """The cell with TRL's own loss; a loss that TRL does not have (pairs without contrast) stays."""
    arm = cell.arm.arm
    if arm.loss.get("contrast", "paired") == "paired" and arm.trainer.get("max_steps") != 0:
        arm = arm.model_copy(update={"loss": {"name": UPSTREAM}})
    return dataclasses.replace(cell, arm=dataclasses.replace(cell.arm, arm=arm))


def page(grid: Grid, found: dict[str, dict[str, list[float]]], name: str) -> str:
    """The table."""
    t = grid.tables
    places, later = len(t.tasks) * len(t.examples), len(t.seeds) - 1
    tuned_once = t.budget.per == "arm"

    def whole(cells: list[float]) -> float:
        return places * (cells[0] + later * cells[-1 if tuned_once else 0])

    totals = {way: sum(whole(arm[way]) for arm in found.values()) for way in ("ours", "stock")}
    lines = [
        f"# What the grid {name} costs, against the same cells run one by one with TRL and PEFT",
        "",
        f"`python -m steertune.recipes.benchmark_grid {name} --threads {torch.get_num_threads()}`, torch "
        f"{torch.__version__}. The first cell of an arm tunes, later seeds do not. One cell an arm was timed, one "
        f"way after the other, and the whole grid ({len(grid.cells())} cells) is extrapolated from it.",
        "",
        "| arm | ours, s (first, later) | stock, s (first, later) | all its cells: stock over ours |",
        "|---|---|---|---|",
    ]
    for arm, ways in found.items():
        cells = {way: " ".join(f"{s:.0f}" for s in seconds) for way, seconds in ways.items()}
        ratio = whole(ways["stock"]) / whole(ways["ours"])
        lines.append(f"| {arm} | {cells['ours']} | {cells['stock']} | {ratio:.1f} |")
    lines += [
        f"| whole grid, extrapolated | {totals['ours']:.0f} | {totals['stock']:.0f} "
        f"| {totals['stock'] / totals['ours']:.1f} |"
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
