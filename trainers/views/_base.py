"""What a view is, and how it is found by its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ...adapters.registry import by_name, file_names

_FOLDER = Path(__file__).parent
Row = Mapping[str, Any]


class ViewError(ValueError):
    """A view that a loss needs is missing, or cannot be made of the data; the message names the fix."""


class View(ABC):
    """Another version of every example. Subclasses are frozen dataclasses of their options, one file each.

    Attributes:
        same_answers: Whether the answers are those of the example, token for token, so that states and distributions
            can be compared token by token.
    """

    same_answers: ClassVar[bool] = True

    @property
    def teacher(self) -> nn.Module | None:
        """The model that sees it in place of the reference; None: the reference does."""
        return None

    def for_evaluation(self, training: Sequence[Row], rows: Sequence[Row]) -> View:
        """The view of evaluation rows; itself, unless it shows other rows.

        Raises:
            ViewError: it would show evaluation rows.
        """
        return self

    @abstractmethod
    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """The views of rows in one of TRL's formats, in their order.

        Raises:
            ViewError: the rows cannot be seen this way.
        """


def names() -> list[str]:
    """The views: the files of this folder."""
    return file_names(_FOLDER)


def get_view(view: str | View, **options: Any) -> View:
    """A view by name (its file), with its options; a `View` object is returned as it is.

    Raises:
        ValueError: an unknown name or option (the message names the nearest), options for an object.
    """
    return by_name("view", str(__package__), _FOLDER, View, view, options)


def prompt_of(row: Row) -> Any:
    """The prompt of a row.

    Raises:
        ViewError: the row has no prompt of its own.
    """
    if "prompt" not in row:
        raise ViewError(f"A view changes the prompt, and the data have only {list(row)}: give a column 'prompt'.")
    return row["prompt"]
