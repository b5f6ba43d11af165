"""What all cells of a grid share, loaded once: the base model, the tasks' rows, and the base's results on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset

from steertune.adapters import SteeringVectorConfig
from steertune.adapters.blocks import find_blocks, resolve_layers
from steertune.recipes.ablation.budget import Setting
from steertune.recipes.ablation.grid import Cell, Grid, behaviour_of
from steertune.recipes.ablation.tables import TaskTable
from steertune.recipes.ablation.winner import Winner
from steertune.recipes.lab import zoo
from steertune.recipes.lab.arm import Arm
from steertune.recipes.lab.data import load_model, model_has_template
from steertune.recipes.lab.forms import notes_on_form, readable
from steertune.recipes.lab.generation import check_context, prompt_lengths
from steertune.recipes.lab.ingredients import Training
from steertune.recipes.lab.ingredients.prompt import Prompt
from steertune.recipes.lab.observe import HeldOut, Show, neutral_rows
from steertune.recipes.lab.scorers import Scorer, fit
from steertune.recipes.lab.sources import Reading, load_split
from steertune.recipes.lab.splits import Splits, load_splits
from steertune.recipes.lab.tables import ModelTable
from steertune.recipes.lab.training import training_of
from steertune.trainers import FrozenPrefix

_ANSWERED = 16  # neutral prompts that are answered, to measure repetition
_BATCH = 16  # test rows per forward pass; their common beginning runs once
_MEMO_GB = 2.0  # RAM for states that are constant in all cells; the rest goes to temporary files


_T = TypeVar("_T")


def _once_per_task(method: Callable[[Context, TaskTable], _T]) -> Callable[[Context, TaskTable], _T]:
    """Cache a method's result for each task by its label, since a task with instructions cannot be hashed."""

    @wraps(method)
    def cached(self: Context, task: TaskTable) -> _T:
        key = method, task.label
        if key not in self._of_tasks:
            self._of_tasks[key] = method(self, task)
        return self._of_tasks[key]

    return cached


class Context:
    """What the cells of a grid share. Everything is loaded or computed when it is first needed, and cached."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.prefix = FrozenPrefix(_MEMO_GB, warn=False)
        self.cache: dict[Any, Any] = {}
        """What ingredients cache from one training to the next."""
        self.winner = Winner()
        """The best trial of the last tuning."""
        self._neutral_logps: dict[str, list[torch.Tensor]] = {}  # of the base, for all tasks
        self._of_tasks: dict[Any, Any] = {}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, tokenizer = load_model(ModelTable(**self.grid.tables.model))
        return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer

    @property
    def model(self) -> Any:
        """The base model; cells train copies of it."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._loaded[1]

    @cached_property
    def neutral(self) -> tuple[Dataset, Dataset]:
        """Prompts and completions that are unrelated to any behaviour: the rows on which strengths are matched, and
        the rows on which side effects are reported."""
        file = self.grid.tables.neutral
        rows = None if file is None else readable(load_split(file, "train"), self.tokenizer)
        return neutral_rows(self.tokenizer, "match", rows), neutral_rows(self.tokenizer, "report", rows)

    @_once_per_task
    def read(self, task: TaskTable) -> Splits:
        """The task's rows as they are in its files, checked; the model is not loaded."""
        tables = self.grid.tables
        reading = Reading(task.columns, task.format, partial(model_has_template, ModelTable(**tables.model)))
        largest = max(tables.examples) * max(arm.arm.data.times for arm in self.grid.arms)
        return load_splits(task.name, tables.splits, largest, task.reverse, reading)

    @_once_per_task
    def splits(self, task: TaskTable) -> Splits:
        """The task's rows in the form that the model reads."""
        return self.read(task).each(partial(readable, tokenizer=self.tokenizer))

    def notes(self, task: TaskTable) -> list[str]:
        """Notes about the form of the task's rows."""
        return notes_on_form(self.read(task).test, self.tokenizer)

    @_once_per_task
    def scorer(self, task: TaskTable) -> Scorer:
        """The task's scorer of the behaviour."""
        return fit(task.scorer, self.splits(task).scorer, self.model, self.tokenizer)

    @_once_per_task
    def held_out(self, task: TaskTable) -> HeldOut:
        """The task's test rows and the neutral text, with the base model's results on them."""
        tables, behaviour = self.grid.tables, behaviour_of(task)
        return HeldOut(
            self.model,
            self.tokenizer,
            pairs=self.splits(task).test,
            matching=self.neutral[0],
            neutral=self.neutral[1],
            generations=tables.generations,
            neutral_generations=min(tables.generations, _ANSWERED),
            questions=tables.questions,
            instruction=behaviour.opposites.positive if behaviour.opposites else "",
            undo=behaviour.undo.apply if behaviour.undo else None,
            new_tokens=tables.new_tokens,
            scorer=self.scorer(task) if tables.generations else None,
            prefix=self.prefix,
            neutral_logps=self._neutral_logps,
            batch_size=_BATCH,
        )

    def training(self, cell: Cell, seed: int, model: Any, folder: Path, setting: Setting) -> Training:
        """The training of a cell's arm on its rows. `seed` draws the training rows and seeds the training;
        checkpoints go to `folder`."""
        arm, splits = cell.arm.arm, self.splits(cell.task)
        rows = splits.train(cell.examples * arm.data.times, seed, arm.data.pairing, cell.task.draw)
        # a task with swapped answers, or made of other columns, is not the one that its folder describes
        name = cell.task.label if cell.task.reverse or cell.task.columns else cell.task.name
        data = arm.data.model_copy(update={"name": name, "seed": seed, "train": cell.examples})
        trainer = {**arm.trainer, **setting.trainer(arm.trainer)}
        arm = arm.model_copy(
            update={"data": data, "trainer": trainer, "adapter": self._adapter(arm, setting, cell.task)}
        )
        return training_of(
            arm,
            model,
            self.tokenizer,
            rows,
            folder,
            held_out=[splits.test, splits.validation],
            near=self.grid.tables.splits.near_duplicates,
            cache=self.cache,
        )

    def _adapter(self, arm: Arm, setting: Setting, task: TaskTable) -> dict[str, Any]:
        """The arm's adapter at the layer of a setting, without the embedded vector that was trained on this task."""
        adapter = dict(arm.adapter)
        if "basis" in adapter:
            adapter["basis"] = zoo.without(adapter["basis"], task.name)
        if setting.layer is None:
            return adapter
        if isinstance(arm.peft_config(), SteeringVectorConfig):
            return {**adapter, "layers": setting.layer}
        return {**adapter, "layers_to_transform": resolve_layers(setting.layer, len(find_blocks(self.model)))}

    def show(self, cell: Cell, seed: int, instruction: int = 0) -> Show:
        """The function that puts a cell's prompt in front of rows; it returns them unchanged unless the arm is a
        prompt. Demonstrations are the cell's training rows of `seed`; `instruction` is the index of the task's
        instruction."""
        prompt = cell.arm.arm.get(Prompt)
        if not prompt:
            return lambda rows: rows
        add_prompt = prompt.show(instructions(cell)[instruction], self.splits(cell.task).train(cell.examples, seed))

        def checked(rows: Dataset) -> Dataset:
            shown = add_prompt(rows)
            check_context(self.model, self.tokenizer, shown, self.grid.tables.new_tokens, cell.title)
            return shown

        return checked

    def prompt_tokens(self, cell: Cell, show: Show) -> float:
        """Average number of tokens that the cell's prompt adds to a request."""
        rows = self.splits(cell.task).test
        plain, shown = (prompt_lengths(self.tokenizer, part["prompt"]) for part in (rows, show(rows)))
        return sum(b - a for a, b in zip(plain, shown, strict=True)) / len(plain)


def instructions(cell: Cell) -> list[str]:
    """The instructions that the tuning of a prompting arm tries; a single empty one if the arm gives none."""
    return cell.task.instructions if cell.arm.arm.get(Prompt).instruction else [""]
