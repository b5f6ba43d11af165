"""Try one row of everything that a grid needs, and every arm's trainer, before any cell runs; dry runs do it too."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from steertune.recipes.ablation.budget import Setting
from steertune.recipes.ablation.context import Context, instructions
from steertune.recipes.ablation.grid import Cell
from steertune.recipes.ablation.run import make_cell_trainer
from steertune.recipes.ablation.tables import TaskTable
from steertune.recipes.lab import measures
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.ingredients.augmentation import Augmentation
from steertune.recipes.lab.ingredients.prompt import Prompt
from steertune.recipes.lab.ingredients.teachers import Teachers
from steertune.recipes.lab.rehearsal import rehearse, rehearse_rows, rehearse_views


class Draw(NamedTuple):
    """Identifies the training rows of a cell."""

    task: str
    examples: int
    seed: int
    pairing: str
    number: int


def rehearse_grid(cells: Sequence[Cell], context: Context) -> list[str]:
    """Try what the cells that are left to run need; return notes about the rows.

    Raises:
        ArmError: something would fail in a cell; the message names the task or the arm.
    """
    notes: dict[str, None] = {}
    tasks = {cell.task.label: cell.task for cell in cells}
    for number, (label, task) in enumerate(tasks.items()):
        notes |= dict.fromkeys(context.notes(task))
        held_out = context.held_out(task)
        # all rows of every task are read; one row of the first task is measured in every way, but only one pair of the
        # other tasks, whose neutral text and answers are of the same kind
        of_test = None if number == 0 else measures.served_by("pairs")
        for pairs, names in ((held_out.pairs, of_test), (context.splits(task).validation, [])):
            try:
                rehearse(replace(held_out, pairs=pairs, shared={}), names)
            except ValueError as error:
                raise ArmError(f"Task {label!r}: {error}") from error

    # the largest training set of every arm and task contains the smaller ones
    largest = {(cell.arm.name, cell.task.label): cell for cell in sorted(cells, key=lambda cell: cell.examples)}
    constructed: set[str] = set()
    # several arms may share training rows
    rehearsed = cache(partial(_rehearse_rows, context, tasks))
    for cell in largest.values():
        try:
            notes |= dict.fromkeys(_rehearse_arm(cell, context, rehearsed, cell.arm.name not in constructed))
        except ValueError as error:
            raise ArmError(f"Arm {cell.arm.name!r}, task {cell.task.label!r}: {error}") from error
        constructed.add(cell.arm.name)
    return [*notes]


def _rehearse_rows(context: Context, tasks: Mapping[str, TaskTable], draw: Draw) -> tuple[Dataset, list[str]]:
    """Training rows, and notes about them."""
    rows = context.splits(tasks[draw.task]).train(draw.examples, draw.seed, draw.pairing, draw.number)
    return rows, rehearse_rows(context.model, context.tokenizer, rows)


def _rehearse_arm(
    cell: Cell, context: Context, rehearsed: Callable[[Draw], tuple[Dataset, list[str]]], construct: bool
) -> list[str]:
    """Try what an arm reads: its prompt, or its training rows and its trainer."""
    arm, splits = cell.arm.arm, context.splits(cell.task)
    if arm.get(Prompt):
        for number in range(len(instructions(cell))):
            context.show(cell, cell.seed, number)(splits.test)
        return []
    examples = cell.examples * arm.data.times
    rows, notes = rehearsed(Draw(cell.task.label, examples, cell.seed, arm.data.pairing, cell.task.draw))
    rehearse_views(arm, context.model, context.tokenizer, rows)
    # teachers are trained and new examples made only if needed
    if construct and not arm.get(Teachers):
        ingredients = {name: one for name, one in arm.ingredients.items() if not isinstance(one, Augmentation)}
        plain = replace(cell, arm=replace(cell.arm, arm=arm.model_copy(update={"ingredients": ingredients})))
        with tempfile.TemporaryDirectory() as home:
            make_cell_trainer(plain, context, Setting(), cell.seed, Path(home))
    return notes
