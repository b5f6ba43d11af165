"""One loss, then another: IA2 (2509.22621) matches activations first, and finetunes on tokens afterwards."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._base import At, Loss
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
        first, second = self.loss.needs, self.then.needs
        # What is prepared before training is what either needs; unit, stops and separable are those of the second.
        both = replace(
            second,
            pairs=first.pairs or second.pairs,
            reference=first.reference or second.reference,
            strengths=first.strengths + second.strengths,
            views=tuple(dict.fromkeys(first.views + second.views)),
            states=first.states or second.states,
        )
        object.__setattr__(self, "needs", both)

    def stage(self, step: int, steps: int) -> Loss:
        """The loss of a step (from 0) of so many, of one step the first; afterwards it is the second."""
        return self.loss if step < min(max(1, round(self.share * steps)), max(1, steps - 1)) else self.then

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """As the second."""
        return self.then(at, generator)
