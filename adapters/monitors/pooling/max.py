"""The highest score of a token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ._base import Pooling


@dataclass(frozen=True)
class Max(Pooling):
    """`max(s)`: one bad token is enough. Long rows have more chances of a high score than short ones."""

    def __call__(self, scores_T: Tensor) -> Tensor:
        """`(tokens,)` -> `()`."""
        return scores_T.max()
