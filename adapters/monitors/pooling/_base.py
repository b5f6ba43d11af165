"""What every way of pooling is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor


@dataclass(frozen=True)
class Pooling(ABC):
    """The score of a row, of the scores of its tokens.

    Attributes:
        fitted_on: The state that stands for a row while a direction is fitted: the mean over its tokens, or that of
            the last one.
    """

    fitted_on: ClassVar[Literal["mean", "last"]] = "mean"

    @abstractmethod
    def __call__(self, scores_T: Tensor) -> Tensor:
        """`(tokens,)`, one token or more -> `()`."""

    @property
    def name(self) -> str:
        """Its name: that of its file."""
        return type(self).__module__.rpartition(".")[2]
