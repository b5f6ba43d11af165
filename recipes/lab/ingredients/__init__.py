"""The tables of an arm besides adapter, loss and trainer. Each file is one ingredient, named like its table:

    class LabelNoise(Ingredient):                    # ingredients/label_noise.py, [label_noise] in an arm
        \"\"\"`[label_noise]`: some pairs are swapped.\"\"\"

        share: float = Field(default=0.0, ge=0, le=1)

        def apply(self, training: Training) -> None:
            training.rows = swapped(training.rows, self.share, training.seed)

An ingredient checks its arm, changes a training before its trainer is made, and adds its options that differ from the
defaults to a cell's key. A recipe that does not support it is named in `refused_by`, with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

from datasets import Dataset
from pydantic import BaseModel

from steertune.adapters.registry import file_names
from steertune.recipes.lab.files import ArmError


class ArmLike(Protocol):
    """The arm of an ingredient."""

    name: str
    data: Any
    adapter: dict[str, Any]
    loss: dict[str, Any]
    trainer: dict[str, Any]
    ingredients: dict[str, Ingredient]

    def peft_config(self, adapter: Mapping[str, Any] | None = None) -> Any:
        """The PEFT configuration of an adapter table, by default the arm's."""
        ...

    def views_seen(self) -> tuple[str, ...]:
        """Names of the views that the loss needs."""
        ...


@dataclass
class Training:
    """A training that is about to begin. Ingredients change it, one after the other.

    Attributes:
        arm: The arm to train.
        rows: Training examples.
        folder: Folder for checkpoints.
        seed: Seed of all random draws.
        held_out: Rows that the model is measured on; new examples must not resemble them.
        near: Similarity from which on a new example resembles one of them.
        options: Arguments of the trainer.
        train: Trains another arm on other rows and returns its model: `train(name, changes, rows)`.
        notes: Notes on this training for its page, by ingredient.
        cache: Values that are the same in every training of a study.
    """

    arm: Any
    model: Any
    tokenizer: Any
    rows: Dataset
    folder: Path
    seed: int
    train: Callable[[str, Mapping[str, Any], Dataset], Any]
    held_out: Sequence[Dataset] = ()
    near: float = 0.9
    options: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    cache: MutableMapping[Any, Any] = field(default_factory=dict)


class Ingredient(BaseModel, extra="forbid", strict=True):
    """One table of an arm. Its fields are the table's keys; with all defaults it changes nothing."""

    order: ClassVar[int] = 50
    """Ingredients with a lower number are applied first: examples are made before teachers are trained on them."""
    refused_by: ClassVar[Mapping[str, str]] = {}
    """Recipe -> why it does not support this ingredient."""

    def __bool__(self) -> bool:
        return bool(self.model_dump(exclude_defaults=True))

    def refusals(self) -> Mapping[str, str]:
        """Recipe -> why it does not support this table."""
        return self.refused_by

    def check(self, arm: ArmLike) -> None:
        """Refuse an arm that contradicts this table.

        Raises:
            ArmError: the message names the key and the fix.
        """

    def apply(self, training: Training) -> None:
        """Change a training before its trainer is made."""

    def key(self, arm: ArmLike) -> Any:
        """The part of a cell's key that this ingredient adds, as JSON."""
        return self.model_dump(mode="json", exclude_defaults=True)


class Named(Ingredient, extra="allow"):
    """An ingredient whose table holds tables of any name: `[views.good]`, `[views.bad]`."""

    @property
    def tables(self) -> dict[str, dict[str, Any]]:
        """Name -> options."""
        return dict(self.model_extra or {})

    def model_post_init(self, context: Any) -> None:
        """Refuse anything but tables."""
        for name, options in self.tables.items():
            if not isinstance(options, dict):
                raise ValueError(f"{name}={options!r} must be a table of options")


@cache
def kinds() -> dict[str, type[Ingredient]]:
    """The ingredients by the name of their table: the files of this folder, in the order in which they are applied."""
    classes_of = {}
    for name in file_names(*__path__):
        module = importlib.import_module(f"{__name__}.{name}")
        classes = [value for value in vars(module).values() if isinstance(value, type)]
        [classes_of[name]] = [c for c in classes if issubclass(c, Ingredient) and c.__module__ == module.__name__]
    return dict(sorted(classes_of.items(), key=lambda item: item[1].order))


def check_recipe(arm: ArmLike, recipe: str) -> None:
    """Refuse an arm with an ingredient that a recipe does not support.

    Raises:
        ArmError: the message names the table and the reason.
    """
    for name, ingredient in arm.ingredients.items():
        if ingredient and (reason := ingredient.refusals().get(recipe)) is not None:
            raise ArmError(f"Arm {arm.name!r} has a table [{name}]: {reason}")
