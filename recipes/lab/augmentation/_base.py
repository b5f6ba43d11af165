"""The base class of augmenters, and how to get one by name."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steertune.adapters.registry import by_name, file_names
from steertune.recipes.lab.files import ArmError

_FOLDER = Path(__file__).parent
Row = dict[str, Any]


class AugmentationError(ArmError):
    """No further versions of examples can be made; the message names the examples and a fix."""


class Augmenter(ABC):
    """Makes new versions of examples. Subclasses are frozen dataclasses of their options, one file each."""

    @abstractmethod
    def __call__(self, rows: Sequence[Row], turn: int, seed: int, model: Any, tokenizer: Any) -> list[Row | None]:
        """One new version of every row, or None if none passes the augmenter's own checks. Every
        `turn` (0, 1, 2, ...) asks for other versions.

        The same arguments give the same versions; the caller removes copies and rows that are too close to test text.
        """


def names() -> list[str]:
    """The augmenters: the files of this folder."""
    return file_names(_FOLDER)


def get_augmenter(augmenter: str | Augmenter, **options: Any) -> Augmenter:
    """An augmenter by name (its file), with its options; an `Augmenter` object is returned as it is.

    Raises:
        ValueError: an unknown name or option (the message names the nearest), options for an object.
    """
    frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return by_name("augmenter", str(__package__), _FOLDER, Augmenter, augmenter, frozen)


def drawn(seed: int, *what: Any) -> random.Random:
    """An independent random generator for every combination of arguments."""
    return random.Random("/".join(map(str, (seed, *what))))


def saying(value: Any, text: str) -> Any:
    """A prompt or an answer with its text replaced; a text keeps the white space at its ends, since tokens depend on
    it."""
    if isinstance(value, str):
        start, end = len(value) - len(value.lstrip()), len(value.rstrip())
        return value[:start] + text.strip() + value[end:]
    return [*value[:-1], {**value[-1], "content": text.strip()}]
