"""What a grid is about to do, and how long that takes on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from steertune.adapters import SteeringVectorConfig
from steertune.adapters.blocks import find_blocks, resolve_layers
from steertune.recipes.ablation.bench import Bench
from steertune.recipes.ablation.cell import FEW_NEUTRAL
from steertune.recipes.ablation.checks import batch_size, has_strength
from steertune.recipes.ablation.grid import Cell, Grid, describe
from steertune.recipes.ablation.statistics.paired import smallest_p
from steertune.recipes.ablation.tables import GridTables, TaskTable
from steertune.recipes.ablation.tidy import AGAIN, read_cell
from steertune.recipes.lab.arm import Arm, ArmError
from steertune.recipes.lab.measures import batches
from steertune.trainers import ModelAt

_FORWARDS = 3  # a training step in forward passes: a backward pass costs about two
_SEARCHES = 6, 3  # measurements of the KL on few and on all neutral rows, until a strength matches
_TOKENS = 6  # generated tokens that cost as much as one forward pass of a row


def plan(
    grid: Grid, cells: Sequence[Cell], bench: Bench, folder: Path, processes: int, every_cell: bool = False
) -> str:
    """The card's problem, the design, every arm (or every cell) with its cost and budget, and the time for what is
    left."""
    left = [cell for cell in cells if not (folder / cell.path / "cell.json").exists()]
    seconds = estimate(left, bench, folder) if left else {}
    lines = [
        f"# {grid.tables.name}: {grid.card.problem}",
        describe(cells) + f"; {len(cells) - len(left)} are done.",
        *grid.notes,
        "",
        f"{'arm':<66} {'cells left':>10} {'min a cell':>10} {'minutes':>8}  tuning, batch",
    ]
    for arm in grid.arms:
        own = [seconds[cell.path] / 60 for cell in left if cell.arm.name == arm.name]
        mean = sum(own) / len(own) if own else 0.0
        trained = arm.arm.trainer.get("max_steps") != 0
        budget = f"{arm.budget.trials} x {arm.budget.steps} steps, {batch_size(arm.arm)}" if trained else "not trained"
        lines.append(f"{arm.name:<66} {len(own):>10} {mean:>10.1f} {sum(own):>8.1f}  {budget}")
    if every_cell:
        lines += ["", *(f"{seconds[cell.path] / 60:6.1f} min  {cell.title}" for cell in left)]
    claim, pairs = grid.tables.claim, len(grid.tasks) * len(grid.tables.seeds)
    if claim is not None and (least := smallest_p(pairs)) >= claim.alpha:
        lines += ["", f"{pairs} pairs of task and seed give no p below {least:.2g}: the claim cannot be decided."]
    total = sum(seconds.values()) / 60 / processes
    return "\n".join([*lines, "", f"About {total:.0f} minutes on {processes} process(es)."])


def estimate(cells: Sequence[Cell], bench: Bench, folder: Path) -> dict[Path, float]:
    """Seconds of every cell: from cells of the same arm and task that ran, else from one timed forward pass a task."""
    rows = {task.label: _row_seconds(bench, task) for task in bench.grid.tasks}
    shares = {arm.name: _share(arm.arm, len(find_blocks(bench.model))) for arm in bench.grid.arms}
    found, tuned = {}, set()
    for cell in cells:
        tunes = cell.tuning_file not in tuned and not (folder / cell.tuning_file).exists()
        tuned.add(cell.tuning_file)
        known = [_known(file, tunes, cell) for file in _siblings(folder, cell)]
        if known:
            found[cell.path] = sum(known) / len(known)
        else:
            own, tuning = _forwards(cell, bench.grid.tables, len(bench.neutral_data), shares[cell.arm.name])
            seconds = rows[cell.task.label] * own
            found[cell.path] = seconds + (rows[cell.tuned_at[0].label] * tuning if tunes else 0)
    return found


def _forwards(cell: Cell, tables: GridTables, neutral: int, share: float) -> tuple[float, float]:
    """Forward passes of whole rows that a cell and its tuning take; `share` of a pass is not remembered."""
    budget = cell.arm.budget
    untrained = cell.arm.arm.trainer.get("max_steps") == 0
    step = 0 if untrained else 2 * batch_size(cell.arm.arm) * _FORWARDS  # two answers a pair
    few, all_rows = _SEARCHES
    search = few * FEW_NEUTRAL + all_rows * neutral if has_strength(cell.arm.arm) else 0
    at_match = budget.strengths == "matched"
    strengths = 1 if at_match or not search else 2
    generating = strengths * tables.generations * tables.new_tokens / _TOKENS
    measuring = strengths * 2 * tables.splits.test + (0 if search and at_match else neutral)
    training = sum(budget.steps) / len(budget.steps) * step
    validating = 2 * tables.splits.validation * budget.measured_at + (search if at_match else 0)
    trials = 1 if untrained and at_match else budget.trials
    own = share * (training + search + measuring) + generating
    return own, share * (budget.steps_spent() * step + trials * validating)


def _share(arm: Arm, depth: int) -> float:
    """Share of the blocks from the lowest one that an arm trains: what is below is remembered."""
    config = arm.peft_config()
    if isinstance(config, SteeringVectorConfig):
        return 1 - min(resolve_layers(config.layers, depth)) / depth
    layers = getattr(config, "layers_to_transform", None)
    lowest = layers if isinstance(layers, int) else min(layers or [0])
    return 1 - lowest / depth


def _known(file: Path, tunes: bool, like: Cell) -> float:
    """Seconds of a cell that ran, without its tuning where that need not be done again."""
    cell = read_cell(file)
    for name in ("seconds", "tuning_seconds"):
        if not isinstance(cell.get(name), int | float):
            raise ArmError(f"{file} is no cell: {name}={cell.get(name)!r:.80}. {AGAIN}")
    task, examples, seed = like.tuned_at
    tuned_itself = (cell["task"], cell["examples"], cell["seed"]) == (task.label, examples, seed)
    return cell["seconds"] - (cell["tuning_seconds"] if tuned_itself and not tunes else 0)


def _siblings(folder: Path, cell: Cell) -> list[Path]:
    return sorted((folder / cell.path.parents[1]).glob(f"seed*/{cell.arm.name}/cell.json"))


@torch.no_grad()
def _row_seconds(bench: Bench, task: TaskTable) -> float:
    rows = bench.splits(task).validation
    [batch] = batches(bench.tokenizer, rows.select(range(min(4, len(rows)))), 4)
    seconds = 0.0
    for _ in range(2):  # the first pass warms up
        start = time.monotonic()
        ModelAt(bench.model, bench.model, batch.to(bench.model.device))(1.0)
        seconds = time.monotonic() - start
    return seconds / len(batch.labels)
