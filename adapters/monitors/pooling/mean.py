"""The mean over the tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ._base import Pooling


@dataclass(frozen=True)
class Mean(Pooling):
    """`mean(s)`: every token counts the same."""

    def __call__(self, scores_T: Tensor) -> Tensor:
        """`(tokens,)` -> `()`."""
        return scores_T.mean()
