"""What all cells of a grid share, each computed once: the base model, the tasks' rows, what the base does on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from steertune.recipes.ablation.grid import Cell, Grid
from steertune.recipes.ablation.tables import TaskTable
from steertune.recipes.lab.arm import ModelTable
from steertune.recipes.lab.augmentation import Grown, grown
from steertune.recipes.lab.data import load_model, load_split
from steertune.recipes.lab.measures import generate, neutral_logps, neutral_rows, pair_margins
from steertune.recipes.lab.scorers import Scorer, fit
from steertune.recipes.lab.splits import Splits, load_splits
from steertune.trainers import FrozenPrefix

_MEMO_GB = 2.0  # RAM for what is constant in all cells; the rest goes to temporary files


@dataclass(frozen=True)
class BaseMeasures:
    """The base model on a task's test rows."""

    margins: Tensor
    answers: list[str]


class Bench:
    """Loads and computes when asked, and keeps.

    Args:
        grid: The grid.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._splits: dict[str, Splits] = {}
        self._bases: dict[str, BaseMeasures] = {}
        self._scorers: dict[str, Scorer] = {}
        self._grown: dict[tuple[Any, ...], Grown] = {}
        self.prefix = FrozenPrefix(_MEMO_GB, warn=False)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        loaded: tuple[Any, Any] = load_model(ModelTable(**self.grid.tables.model))
        model, tokenizer = loaded
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
    def neutral(self) -> list[tuple[Tensor, Tensor]]:
        """`neutral_logps` of the base model."""
        with self.remembering(self.model):
            return neutral_logps(self.model, self.tokenizer, self.neutral_data)

    @cached_property
    def neutral_data(self) -> Dataset:
        """Prompts and completions that no behaviour is about."""
        file = self.grid.tables.neutral
        return neutral_rows() if file is None else load_split(file, "train")

    def splits(self, task: TaskTable) -> Splits:
        """The task's rows, checked."""
        if task.label not in self._splits:
            tables = self.grid.tables
            self._splits[task.label] = load_splits(
                task.name, tables.splits, max(tables.examples), task.reverse, task.columns
            )
        return self._splits[task.label]

    def training_set(self, cell: Cell, seed: int) -> Grown:
        """What a cell trains on: rows of the task's pool and, where its arm asks for them, versions of these."""
        arm, splits, sizes = cell.arm.arm, self.splits(cell.task), self.grid.tables.splits
        rows = splits.train(cell.examples, seed, arm.data.pairing, cell.task.draw)
        asked = arm.augmenter()
        if asked is None:
            return Grown(rows, "")
        key = (cell.task.label, cell.examples, seed, arm.data.pairing, repr(sorted(arm.augmentation.items())))
        if key not in self._grown:
            self._grown[key] = grown(
                rows,
                *asked,
                seed=seed,
                model=self.model,
                tokenizer=self.tokenizer,
                apart=[splits.test, splits.validation],
                near=sizes.near_duplicates,
                show=False,
            )
        return self._grown[key]

    def scorer(self, task: TaskTable) -> Scorer:
        """The task's scorer of the behaviour."""
        if task.label not in self._scorers:
            rows = self.splits(task).scorer
            self._scorers[task.label] = fit(task.scorer, rows, self.model, self.tokenizer)
        return self._scorers[task.label]

    def base(self, task: TaskTable) -> BaseMeasures:
        """The base model on the test rows."""
        if task.label not in self._bases:
            tables, rows = self.grid.tables, self.splits(task).test
            with self.remembering(self.model):
                margins = pair_margins(self.model, self.tokenizer, rows, [1.0], show=False)[1.0]
            prompts = rows["prompt"][: tables.generations] if "prompt" in rows.column_names else []
            answers = generate(self.model, self.tokenizer, prompts, tables.new_tokens) if prompts else []
            self._bases[task.label] = BaseMeasures(margins, answers)
        return self._bases[task.label]

    def base_measures(self, task: TaskTable) -> dict[str, Any]:
        """What a cell keeps of the base model, under names that start with `base_`."""
        from steertune.recipes.ablation.cell import behaviour, preference

        base = self.base(task)
        found = preference(base.margins, base.margins)
        prompts = self.splits(task).test["prompt"][: len(base.answers)] if base.answers else []
        if prompts:
            found |= behaviour(self.scorer(task).score, prompts, base.answers)
        kept = ("accuracy", "margin", "margins", "behaviour", "behaviours", "repetition")
        return {f"base_{name}": found[name] for name in kept if name in found}

    @contextmanager
    def remembering(self, model: Any) -> Iterator[None]:
        """Forward passes inside leave out what the memo knows of `model`. Of finetuned weights it would know nothing,
        and only fill up."""
        shared = model is self._loaded[0] or isinstance(model, PeftModel)
        with self.prefix.on(model, labels_only=True) if shared else nullcontext():
            yield
