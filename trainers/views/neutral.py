"""Text that training should not affect, for a KL to the base model as a regulariser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ._base import Row, View


@dataclass(frozen=True)
class Neutral(View):
    """Rows of another data set, one per example, repeated as often as needed.

    Args:
        rows: Prompts and completions that have nothing to do with the trained behaviour.

    Raises:
        ValueError: `rows` is empty, or one of them is not a prompt with its completion.
    """

    rows: tuple[Row, ...]
    same_answers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        if not self.rows:
            raise ValueError("rows=() must not be empty. Give neutral text as rows with 'prompt' and 'completion'.")
        for i, row in enumerate(self.rows):
            if not isinstance(row, Mapping) or not {"prompt", "completion"} <= set(row):
                raise ValueError(f"rows[{i}]={row!r:.100} must be a row with 'prompt' and 'completion'.")

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Replace every row by a neutral one."""
        return [self.rows[i % len(self.rows)] for i in range(len(rows))]
