"""A function of the user."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ._base import Augmenter, Row, drawn


@dataclass(frozen=True)
class Function(Augmenter):
    """`function(row, random) -> row` for every row and turn; it can return None.

    Args:
        function: The function, or its import path `module:name`. `random` is a separate `random.Random` for each row
            and turn.

    Raises:
        ValueError: there is no such function.
    """

    function: str | Callable[..., Row | None]

    def __post_init__(self) -> None:
        if not callable(self.callable()):
            raise ValueError(f"function={self.function!r} is not a function.")

    def callable(self) -> Callable[..., Row | None]:
        """The function itself."""
        if not isinstance(self.function, str):
            return self.function
        module, colon, name = self.function.partition(":")
        if not colon or not module or not name:
            raise ValueError(f"function={self.function!r}: write module:name.")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"function={self.function!r}: {error}") from error

    def __call__(self, rows: Sequence[Row], turn: int, seed: int, model: Any, tokenizer: Any) -> list[Row | None]:
        """The function's version of each row; it gets a copy that it can change."""
        function = self.callable()
        return [function(copy.deepcopy(row), drawn(seed, turn, i, row["prompt"])) for i, row in enumerate(rows)]
