"""Pool the scores of a row's tokens into the score of the row. Each file of this folder is one pooling method, named
by the file: a dataclass whose fields are its options, called with the scores `(tokens,)` of one row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...registry import by_name, file_names
from ._base import Pooling

__all__ = ["Pooling", "get", "names"]


def names() -> list[str]:
    """The names of all methods: the files of this folder that do not start with an underscore."""
    return file_names(__path__[0])


def get(name: str | Pooling, **options: Any) -> Pooling:
    """A pooling method by name, with its options.

    Raises:
        ValueError: an unknown name or option (the message suggests the nearest one), or a value that is not allowed.
    """
    return by_name("pooling", __name__, Path(__path__[0]), Pooling, name, options)
