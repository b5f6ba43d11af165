"""The last token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ._base import Pooling


@dataclass(frozen=True)
class Last(Pooling):
    """The score of the last token, which attends to all others. The direction is fitted on last tokens, too."""

    fitted_on = "last"

    def __call__(self, scores_T: Tensor) -> Tensor:
        """`(tokens,)` -> `()`."""
        return scores_T[-1]
