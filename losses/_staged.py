"""One loss, then another: IA2 (2509.22621) matches activations first, and finetunes on tokens afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._base import At, Loss, Strength
from ._wrapped import Wrapped


@dataclass(frozen=True)
class Staged(Wrapped):
    """A loss for the first steps of a training and another for the rest. The trainer says how far it is.

    Args:
        loss: The first.
        then: The second.
        share: Of all steps, how many are the first loss's.

    Raises:
        ValueError: a share that leaves one of them nothing.
    """

    then: Loss
    share: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.share, int | float) or isinstance(self.share, bool) or not 0 < self.share < 1:
            raise ValueError(f"then_after={self.share!r}: the first loss's share of the steps, between 0 and 1.")

    def stage(self, step: int, steps: int) -> Loss:
        """The loss of a step (from 0) of so many, of one step the first; afterwards it is the second."""
        return self.loss if step < min(max(1, round(self.share * steps)), max(1, steps - 1)) else self.then

    @property
    def pairs(self) -> bool:
        """If one of them does."""
        return self.loss.pairs or self.then.pairs

    @property
    def unit(self) -> Literal["example", "token"]:
        """The second's."""
        return self.then.unit

    @property
    def reference(self) -> bool:
        """If one of them does."""
        return self.loss.reference or self.then.reference

    @property
    def strengths(self) -> tuple[Strength, ...]:
        """Those of both."""
        return self.loss.strengths + self.then.strengths

    @property
    def separable(self) -> bool:
        """The second's."""
        return self.then.separable

    @property
    def states(self) -> bool:
        """If one of them does."""
        return self.loss.states or self.then.states

    @property
    def stops(self) -> bool:
        """The second's."""
        return self.then.stops

    @property
    def views(self) -> tuple[str, ...]:
        """Those of both."""
        return tuple(dict.fromkeys((*self.loss.views, *self.then.views)))

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """As the second."""
        return self.then(at, generator)
