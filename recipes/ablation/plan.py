"""The plan of a grid, and how long it takes on this machine."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from steertune.adapters import SteeringVectorConfig
from steertune.adapters.blocks import find_blocks, resolve_layers
from steertune.recipes.ablation.checks import batch_size, has_one_layer, has_strength
from steertune.recipes.ablation.context import Context
from steertune.recipes.ablation.grid import Cell, Grid, describe
from steertune.recipes.ablation.kl_search import SEARCH_ROWS
from steertune.recipes.ablation.resolution import resolution, with_twice_the_rows
from steertune.recipes.ablation.statistics.paired import smallest_p
from steertune.recipes.ablation.store import Store, name_of
from steertune.recipes.ablation.tables import GridTables
from steertune.recipes.lab.arm import Arm
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.rows import AGAIN, Record
from steertune.trainers import ModelAt

_FORWARDS = 3  # a training step in forward passes: a backward pass costs about two
_SEARCHES = 6, 2  # measurements of the KL on few and on all neutral rows, until a strength matches
_TOKENS = 6  # generated tokens that cost as much as one forward pass of a row


def plan(
    grid: Grid, cells: Sequence[Cell], context: Context, folder: Path, processes: int, every_cell: bool = False
) -> str:
    """The card's problem, the design, every arm (or every cell) with its cost and budget, and the time for what is
    left."""
    store = Store(folder)
    left = [cell for cell in cells if not store.has(cell)]
    seconds = estimate(left, context, folder) if left else {}
    lines = [
        f"# {grid.tables.name}: {grid.card.problem}",
        describe(cells) + f"; {len(cells) - len(left)} are done.",
        *grid.notes,
        "",
        f"{'arm':<66} {'cells left':>10} {'min / cell':>10} {'minutes':>8}  tuning, batch",
    ]
    for arm in grid.arms:
        of_arm = [seconds[cell.path] / 60 for cell in left if cell.arm.name == arm.name]
        mean = sum(of_arm) / len(of_arm) if of_arm else 0.0
        trained = arm.arm.trainer.get("max_steps") != 0
        budget = f"{arm.budget.trials} x {arm.budget.steps} steps, {batch_size(arm.arm)}" if trained else "not trained"
        lines.append(f"{arm.name:<66} {len(of_arm):>10} {mean:>10.1f} {sum(of_arm):>8.1f}  {budget}")
    if every_cell:
        lines += ["", *(f"{seconds[cell.path] / 60:6.1f} min  {cell.title}" for cell in left)]
        minutes = sum(seconds.values()) / 60 / max(1, len(left))
        lines += ["", *resolution(grid, context, folder, minutes, _with_more_rows(cells, context))]
    claim, pairs = grid.tables.claim, len(grid.tasks) * len(grid.tables.seeds)
    if claim is not None and not claim.sample and (least := smallest_p(pairs)) >= claim.alpha:
        lines += ["", f"{pairs} pairs of task and seed give no p below {least:.2g}: the claim cannot be decided."]
    total = sum(seconds.values()) / 60 / processes
    return "\n".join([*lines, "", f"About {total:.0f} minutes on {processes} process(es)."])


def _with_more_rows(cells: Sequence[Cell], context: Context) -> float:
    """The factor by which the cells take longer with twice the test rows."""
    tables, neutral = context.grid.tables, len(context.neutral[0])
    shares = {arm.name: _share(arm.arm, len(find_blocks(context.model))) for arm in context.grid.arms}
    once, twice = (
        sum(_forwards(cell, sizes, neutral, shares[cell.arm.name])[0] for cell in cells)
        for sizes in (tables, with_twice_the_rows(tables))
    )
    return twice / once


def estimate(cells: Sequence[Cell], context: Context, folder: Path) -> dict[Path, float]:
    """Seconds of every cell: from cells of the same arm and task that ran, else from a timed forward pass."""
    rows = _row_seconds(context)
    shares = {arm.name: _share(arm.arm, len(find_blocks(context.model))) for arm in context.grid.arms}
    # (arm, task, number of examples) -> cells that ran, whatever their seed
    ran: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in Store(folder).records():
        ran[name_of(record)[:3]].append(record)
    seconds_of, tuned = {}, set()
    for cell in cells:
        tunes = cell.tuning_file not in tuned and not (folder / cell.tuning_file).exists()
        tuned.add(cell.tuning_file)
        siblings = [_seconds(r, tunes, cell) for r in ran[cell.arm.name, cell.task.label, cell.examples]]
        if siblings:
            seconds_of[cell.path] = sum(siblings) / len(siblings)
        else:
            forwards, tuning = _forwards(cell, context.grid.tables, len(context.neutral[0]), shares[cell.arm.name])
            seconds = rows[cell.task.label] * forwards
            seconds_of[cell.path] = seconds + (rows[cell.tuned_at[0].label] * tuning if tunes else 0)
    return seconds_of


def _forwards(cell: Cell, tables: GridTables, neutral: int, share: float) -> tuple[float, float]:
    """Forward passes of whole rows that a cell and its tuning take; `share` of a pass is not cached."""
    budget = cell.arm.budget
    untrained = cell.arm.arm.trainer.get("max_steps") == 0
    step = 0 if untrained else 2 * batch_size(cell.arm.arm) * _FORWARDS  # two answers a pair
    few, all_rows = _SEARCHES
    search = few * SEARCH_ROWS + all_rows * neutral if has_strength(cell.arm.arm) else 0
    at_match = budget.strengths == "matched"
    strengths = len(tables.matched.targets) + (not at_match) if search else 1
    answered = strengths - (len(tables.matched.targets) - len(tables.matched.answers) if tables.matched.answers else 0)
    generating = max(1, answered) * tables.generations * tables.new_tokens / _TOKENS
    measuring = strengths * (2 * tables.splits.test + neutral)
    training = sum(budget.steps) / len(budget.steps) * step
    validating = 2 * tables.splits.validation * budget.measured_at + (search if at_match else 0)
    trials = budget.trials + budget.landed
    if untrained and at_match:
        trials = len(budget.layers) if budget.layers and has_one_layer(cell.arm.arm) else 1
    measured = share * (training + len(tables.matched.targets) * search + measuring) + generating
    return measured, share * (budget.steps_spent() * step + trials * validating)


def _share(arm: Arm, depth: int) -> float:
    """Share of the blocks from the lowest one that an arm trains; the states below it are cached."""
    config = arm.peft_config()
    if isinstance(config, SteeringVectorConfig):
        return 1 - min(resolve_layers(config.layers, depth)) / depth
    layers = getattr(config, "layers_to_transform", None)
    lowest = layers if isinstance(layers, int) else min(layers or [0])
    return 1 - lowest / depth


def _seconds(record: Record, tunes: bool, like: Cell) -> float:
    """Seconds of a cell that ran, without its tuning if that need not be repeated.

    Raises:
        ArmError: the record lacks them.
    """
    for name in ("seconds", "tuning_seconds"):
        if not isinstance(record.facts.get(name), int | float):
            raise ArmError(f"A cell of {like.arm.name} is damaged: {name}={record.facts.get(name)!r:.80}. {AGAIN}")
    task, examples, seed = like.tuned_at
    tuned_itself = (record.keys["task"], record.keys["examples"], record.keys["seed"]) == (task.label, examples, seed)
    if tunes or not tuned_itself:
        return record.facts["seconds"]
    # a cell whose own tuning trained its model did not train again; a diverged one has trained nothing
    return record.facts["seconds"] - record.facts["tuning_seconds"] + (record.facts.get("train_seconds") or 0.0)


@torch.no_grad()
def _row_seconds(context: Context) -> dict[str, float]:
    """Task -> seconds of a forward pass of one row: timed for one task, after the rehearsal, and scaled by the number
    of tokens for the others."""
    rows = {task.label: context.splits(task).validation for task in context.grid.tasks}
    of_task = {
        name: batches(context.tokenizer, part.select(range(min(2, len(part)))), 2) for name, part in rows.items()
    }
    first = next(iter(of_task.values()))[0].to(context.model.device)
    start = time.monotonic()
    ModelAt(context.model, context.model, first)(1.0)
    a_token = (time.monotonic() - start) / first.labels.numel()
    return {name: a_token * batch.labels.shape[1] for name, [batch] in of_task.items()}
