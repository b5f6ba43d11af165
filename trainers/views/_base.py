"""The base class of views, and their lookup by name."""

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
    """Raised when a view that a loss needs is missing, or cannot be made from the data; the message names the fix."""


class View(ABC):
    """Another version of every example. Subclasses are frozen dataclasses of their options, one file each.

    Attributes:
        same_answers: Whether the answers have the same tokens as the example's, so that states and distributions can
            be compared token by token.
    """

    same_answers: ClassVar[bool] = True

    @property
    def teacher(self) -> nn.Module | None:
        """The model that runs on the view in place of the reference; None for the reference."""
        return None

    def for_evaluation(self, training: Sequence[Row], rows: Sequence[Row]) -> View:
        """The view to use on evaluation rows; a view that shows other rows replaces them by training rows.

        Raises:
            ViewError: it would show evaluation rows.
        """
        return self

    @abstractmethod
    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Make the view of each row, in order, in the rows' own format (one of TRL's).

        Raises:
            ViewError: the rows have no such view.
        """


def names() -> list[str]:
    """The names of all views: the files of this folder that do not start with an underscore."""
    return file_names(_FOLDER)


def get_view(view: str | View, **options: Any) -> View:
    """Make a view by its name (its file) and options; a `View` object is returned unchanged.

    Raises:
        ValueError: the name or an option is unknown (the message names the nearest), or options come with an object.
    """
    return by_name("view", str(__package__), _FOLDER, View, view, options)


def prompt_of(row: Row) -> Any:
    """Read the prompt of a row.

    Raises:
        ViewError: the row has no prompt.
    """
    if "prompt" not in row:
        raise ViewError(f"A view changes the prompt, but the data have only {list(row)}. Give a column 'prompt'.")
    return row["prompt"]
