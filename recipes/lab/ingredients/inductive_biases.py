"""Inductive biases of ordinary training: `[inductive_biases.NAME]`, a file of `trainers/inductive_biases/`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.ingredients import ArmLike, Named, Training
from steertune.trainers.inductive_biases import get_bias


class InductiveBiases(Named):
    """`[inductive_biases.NAME]`: options of each bias, in the order in which they start."""

    order: ClassVar[int] = 40
    refused_by: ClassVar[Mapping[str, str]] = {
        "gradients": "they change gradients, and gradients measures those of the loss; remove the table."
    }

    def refusals(self) -> Mapping[str, str]:
        """Like the parent's; a recipe that saves its adapter also refuses a bias that is not saved with it."""
        unsaved = [name for name, options in self.tables.items() if not get_bias(name, **options).saved]
        reason = f"{unsaved} train more than the saved adapter would hold; use the arm in a grid."
        saving = ("train", "sweep", "distill", "contrast_prompts") if unsaved else ()
        return {**self.refused_by, **dict.fromkeys(saving, reason)}

    def check(self, arm: ArmLike) -> None:
        """Refuse unknown biases and options."""
        for name, options in self.tables.items():
            try:
                get_bias(name, **options)
            except (ValueError, TypeError) as error:
                raise ArmError(f"[inductive_biases.{name}]: {error}") from error

    def apply(self, training: Training) -> None:
        """Pass the biases to the trainer."""
        training.options["inductive_biases"] = self.tables

    def key(self, arm: ArmLike) -> Any:
        """The biases in order, since each changes what later ones start from."""
        return list(self.tables.items())
