"""Other versions of every example that a loss needs: `[views.NAME]`, whose `name` is a file of `trainers/views/`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from datasets import Dataset
from torch import nn

from steertune.recipes.lab.files import ArmError, read_jsonl
from steertune.recipes.lab.forms import readable
from steertune.recipes.lab.ingredients import ArmLike, Named, Training
from steertune.recipes.lab.paths import TASKS
from steertune.trainers import View, get_view

NEUTRAL = TASKS / "neutral_train.jsonl"
"""Neutral text to train on: different from the text on which the KL is measured."""


class Views(Named):
    """`[views.NAME]`: a view, under the name that the loss uses."""

    order: ClassVar[int] = 30

    def views(
        self, teachers: Mapping[str, nn.Module] | None = None, known: Any = None, tokenizer: Any = None
    ) -> dict[str, View]:
        """The views by name.

        Args:
            teachers: The trained models of `[teachers]`; None: a placeholder for each of `known`.
            known: Names in `[teachers]`.
            tokenizer: The model's tokenizer; if it has no chat template, neutral text is plain text. None: unknown.

        Raises:
            ArmError: an unknown view, option or teacher.
        """
        views = {}
        names = set(teachers or {}) | set(known or ())
        for key, table in self.tables.items():
            options = dict(table)
            name = str(options.pop("name", key))
            if name == "neutral":
                rows = Dataset.from_list(options.get("rows") or read_jsonl(NEUTRAL))
                options["rows"] = (rows if tokenizer is None else readable(rows, tokenizer)).to_list()
            if name == "teacher":
                teacher = str(options.get("model", key))
                if teacher not in names:
                    raise ArmError(f"views.{key}.model={teacher!r} must be one of [teachers]: {sorted(names)}.")
                options["model"] = nn.Identity() if teachers is None else teachers[teacher]
            try:
                views[key] = get_view(name, **options)
            except (ValueError, TypeError) as error:
                raise ArmError(f"[views.{key}]: {error}") from error
        return views

    def check(self, arm: ArmLike) -> None:
        """Refuse views that cannot be made."""
        teachers = arm.ingredients.get("teachers")
        self.views(known=getattr(teachers, "tables", {}))

    def apply(self, training: Training) -> None:
        """Pass the views that the loss needs to the trainer; after an override of the loss some may be unused."""
        teachers = training.options.pop("teachers", {})
        needed = training.arm.views_seen()
        views = self.views(teachers, tokenizer=training.tokenizer)
        training.options["views"] = {name: view for name, view in views.items() if name in needed}
