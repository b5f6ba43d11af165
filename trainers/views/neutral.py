"""Other text that training should leave alone: for a KL to the base model as a regulariser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ._base import Row, View


@dataclass(frozen=True)
class Neutral(View):
    """Rows of another data set, one an example, over and over.

    Args:
        rows: Prompts and completions that no behaviour is about.

    Raises:
        ValueError: no rows, or one that is no prompt with its completion.
    """

    rows: tuple[Row, ...]
    same_answers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        if not self.rows:
            raise ValueError("rows=(): neutral text is needed, as rows with 'prompt' and 'completion'.")
        for i, row in enumerate(self.rows):
            if not isinstance(row, Mapping) or not {"prompt", "completion"} <= set(row):
                raise ValueError(f"rows[{i}]={row!r:.100}: a row with 'prompt' and 'completion' is needed.")

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """A neutral row for every row."""
        return [self.rows[i % len(self.rows)] for i in range(len(rows))]
