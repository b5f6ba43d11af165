"""The base class of pooling methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor


@dataclass(frozen=True)
class Pooling(ABC):
    """Pools the scores of a row's tokens into the score of the row.

    Attributes:
        fitted_on: The state that represents a row while a direction is fitted: the mean over its tokens, or that of
            the last one.
    """

    fitted_on: ClassVar[Literal["mean", "last"]] = "mean"

    @abstractmethod
    def __call__(self, scores_T: Tensor) -> Tensor:
        """`(tokens,)`, at least one token -> `()`."""

    @property
    def name(self) -> str:
        """The name of the method: that of its file."""
        return type(self).__module__.rpartition(".")[2]
