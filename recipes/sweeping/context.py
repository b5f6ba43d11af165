"""Shared by all settings of a sweep, and computed once: the base model, the rows, the base's observations on them."""

from __future__ import annotations

from functools import cache, cached_property, partial
from pathlib import Path

from datasets import Dataset

from steertune.adapters.config import Site
from steertune.recipes.lab import scorers
from steertune.recipes.lab.cut_answers import too_short
from steertune.recipes.lab.data import load_model, model_has_template
from steertune.recipes.lab.evaluate import evaluate_base
from steertune.recipes.lab.forms import notes_on_form, readable
from steertune.recipes.lab.observe import FEW_NEUTRAL, HeldOut, neutral_rows
from steertune.recipes.lab.rehearsal import rehearse, rehearse_training
from steertune.recipes.lab.rows import Record
from steertune.recipes.lab.sources import Reading
from steertune.recipes.lab.splits import load_splits
from steertune.recipes.lab.trained_on import TrainedOn
from steertune.recipes.sweeping.settings import SweepTable
from steertune.trainers import FrozenPrefix

_MEMO_GB = 2.0
TEST, VALIDATION = "test", "validation"


class Context:
    """The base model and the rows of a sweep. The *part* `validation` is for choosing, and `test` is used once.
    Neutral text is divided between the two as well.

    Raises:
        ArmError: the rows are not pairs, are too few, or occur in two splits.
    """

    def __init__(self, table: SweepTable) -> None:
        # bad rows are refused before the model is loaded
        reading = Reading(table.columns, table.format, partial(model_has_template, table.model))
        splits = load_splits(table.task, table.splits, table.train, reading=reading, at_most=True)
        self.model, self.tokenizer = load_model(table.model)
        self.splits = splits.each(partial(readable, tokenizer=self.tokenizer))
        self._notes = notes_on_form(splits.test, self.tokenizer)
        # a single file can have fewer rows than requested
        sizes = {part: len(getattr(self.splits, part)) for part in ("validation", "scorer", "test")}
        split_table = table.splits.model_copy(update=sizes)
        self.table = table.model_copy(update={"train": min(table.train, len(splits.pool)), "splits": split_table})
        # a vector at the output of block i leaves i + 1 blocks unchanged, one inside the block leaves i
        stops = {layer + extra for layer in table.layers for extra in (0, 1)}
        self.prefix = FrozenPrefix(_MEMO_GB, warn=False, stops=stops)
        self.held_out = cache(self._make_held_out)

    def rehearse(self) -> list[str]:
        """Try one row of everything; return notes on the rows.

        Raises:
            ArmError: rows that the model cannot read, or that are longer than its context.
            DataError: rows that cannot be trained on.
        """
        for part in (VALIDATION, TEST):
            rehearse(self.held_out(part))
        rows = self.splits.train(self.table.train, self.table.seed)
        return [*self._notes, *rehearse_training(self.table.arm, self.model, self.tokenizer, rows), *self._cut()]

    def _cut(self) -> list[str]:
        """A note if answers of `new_tokens` are too short to show the behaviour."""
        if self.scorer is None or not self.table.generations:
            return []
        finding = too_short(self.splits.test, self.scorer, self.tokenizer, self.table.new_tokens, "--new-tokens")
        return [] if finding is None else [finding.text]

    def trained_on(self) -> list[TrainedOn]:
        """The record of the rows that the adapter was made from and chosen on."""
        train = self.splits.train(self.table.train, self.table.seed)
        return [TrainedOn.of(rows, self.splits.by) for rows in (train, self.splits.validation)]

    def rows(self, part: str) -> Dataset:
        """The task's rows of a part."""
        return self.splits.test if part == TEST else self.splits.validation

    @cached_property
    def scorer(self) -> scorers.Scorer | None:
        """The scorer of the behaviour, if one was requested."""
        if self.table.scorer is None:
            return None
        return scorers.fit(self.table.scorer, self.splits.scorer, self.model, self.tokenizer)

    def record(self, site: Site, layer: int, part: str) -> Record:
        """A new record of a place with the base model's observations on a part. The base's pass also fills the prefix
        cache, from which the settings get the states of the lower blocks."""
        table = self.table
        name = table.direction if table.arm is None else table.arm.name
        task = Path(table.task).name
        keys = {
            "arm": f"{name}/{site}-{layer}",
            "task": task if part == TEST else f"{task}/{part}",
            "examples": table.train,
            "seed": table.seed,
        }
        facts = {"site": site, "layer": layer, "status": "ok"}
        return Record(keys, dict(evaluate_base(self.held_out(part))), facts)

    def _make_held_out(self, part: str) -> HeldOut:
        count = self.table.generations
        # the neutral rows for choosing are not those of the report
        if part == TEST:
            neutral = neutral_rows(self.tokenizer)
        else:
            neutral = neutral_rows(self.tokenizer, "match", count=FEW_NEUTRAL)
        return HeldOut(
            self.model,
            self.tokenizer,
            pairs=self.rows(part),
            neutral=neutral,
            generations=count if self.scorer is not None else 0,
            neutral_generations=count,
            new_tokens=self.table.new_tokens,
            scorer=self.scorer,
            prefix=self.prefix,
        )
