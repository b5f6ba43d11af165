"""The mean weighted by the softmax of the scores: between `mean` and `max`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ._base import Pooling


@dataclass(frozen=True)
class Softmax(Pooling):
    """`Σ_t softmax(s / temperature)_t s_t`.

    Args:
        temperature: In units of the score, which is 1 for a standard deviation of innocent rows. Towards 0 it is
            `max`, towards infinity `mean`.

    Raises:
        ValueError: `temperature` is not above 0 and finite.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be a finite number above 0.")

    def __call__(self, scores_T: Tensor) -> Tensor:
        """`(tokens,)` -> `()`."""
        return (scores_T / self.temperature).softmax(dim=0) @ scores_T
