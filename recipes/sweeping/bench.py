"""What all cells of a sweep share, each computed once: the base model, the rows, what the base does on them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from steertune.recipes.ablation.cell import behaviour, preference
from steertune.recipes.lab import scorers
from steertune.recipes.lab.measures import (
    generate,
    neutral_logps,
    neutral_rows,
    pair_margins,
    repetition,
    side_effects,
)
from steertune.recipes.lab.splits import load_splits
from steertune.recipes.sweeping.settings import SweepTable
from steertune.trainers import FrozenPrefix, scaled

_MEMO_GB = 2.0
HELD_OUT = "test"


class Bench:
    """The base model and the rows of a sweep; a *part* of the rows is `validation`, which chooses, or `test`, which is
    read once. Neutral text is halved between them.

    Args:
        table: The sweep.
        model: The base model.
        tokenizer: Its tokenizer.

    Raises:
        ArmError: rows that are no pairs, too few of them, or rows that stand in two splits.
    """

    def __init__(self, table: SweepTable, model: Any, tokenizer: Any) -> None:
        self.table, self.model, self.tokenizer = table, model, tokenizer
        self.splits = load_splits(table.task, table.splits, table.train)
        # a vector on the output of block i leaves i + 1 blocks as they were, what is inside it leaves i
        cuts = {layer + extra for layer in table.layers for extra in (0, 1)}
        self.prefix = FrozenPrefix(_MEMO_GB, warn=False, stops=cuts)
        self._bases: dict[str, dict[str, Any]] = {}
        self._neutral: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def rows(self, part: str) -> Dataset:
        """The task's rows of a part."""
        return self.splits.test if part == HELD_OUT else self.splits.validation

    def neutral(self, part: str) -> Dataset:
        """The neutral rows of a part: every other one."""
        rows = neutral_rows()
        return rows.select(range(1 if part == HELD_OUT else 0, len(rows), 2))

    @cached_property
    def scorer(self) -> scorers.Scorer | None:
        """The scorer of the behaviour, where one was asked for."""
        if self.table.scorer is None:
            return None
        return scorers.fit(self.table.scorer, self.splits.scorer, self.model, self.tokenizer)

    def base(self, part: str) -> dict[str, Any]:
        """What the base model does on a part. Its pass leaves in the memo what the cells need of the lower blocks."""
        if part not in self._bases:
            with self.remembering(self.model):
                self._bases[part] = self._measured(self.model, 1.0, part)
        return self._bases[part]

    def remembering(self, model: Any) -> AbstractContextManager[None]:
        """Forward passes inside leave out what the memo knows. Entering it reads the weights below the adapter."""
        return self.prefix.on(model, labels_only=True)

    def measured(self, model: Any, strength: float, part: str) -> dict[str, Any]:
        """What a model does on a part at a strength: preference, side effects and, where asked, generated answers.
        Inside `remembering` it is cheap."""
        self.base(part)
        return self._measured(model, strength, part)

    @torch.no_grad()
    def _measured(self, model: Any, strength: float, part: str) -> dict[str, Any]:
        rows = self.rows(part)
        with scaled(model, strength):
            # at 1: as it is scaled here
            margins = pair_margins(model, self.tokenizer, rows, [1.0], show=False)[1.0]
            neutral = neutral_logps(model, self.tokenizer, self.neutral(part))
            base = self._neutral.setdefault(part, neutral)
            known = self._bases.get(part)
            before = margins if known is None else torch.tensor(known["margins"])
            found = preference(margins, before) | side_effects(neutral, base)
            return found | self._answers(model, part)

    def _answers(self, model: Any, part: str) -> dict[str, Any]:
        count, found = self.table.generations, {}
        if not count:
            return {}
        asked = self.neutral(part)["prompt"][:count]
        answers = generate(model, self.tokenizer, asked, self.table.new_tokens)
        found |= {"repetition": repetition(answers), "neutral_answers": answers}
        if self.scorer is not None:
            prompts = self.rows(part)["prompt"][:count]
            answers = generate(model, self.tokenizer, prompts, self.table.new_tokens)
            scored = behaviour(self.scorer.score, prompts, answers)
            found |= {name: scored[name] for name in ("behaviour", "behaviours", "judgements_failed", "answers")}
        return found
