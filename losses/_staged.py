"""One loss after another: IA2 (2509.22621) first matches activations, and then finetunes on tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._base import At, Loss
from ._wrapped import Wrapped


@dataclass(frozen=True)
class Staged(Wrapped):
    """A loss for the first steps of a training run and another for the rest. The trainer calls `stage` at each step.

    Args:
        loss: The first.
        then: The second.
        share: The share of all steps that train on the first loss.

    Raises:
        ValueError: the share is not between 0 and 1.
    """

    then: Loss
    share: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.share, int | float) or isinstance(self.share, bool) or not 0 < self.share < 1:
            raise ValueError(
                f"then_after={self.share!r} must be a number between 0 and 1: the first loss's share of the steps."
            )
        first, second = self.loss.needs, self.then.needs
        # Before training, the needs of both are prepared; unit, stops and separable are those of the second.
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
        """The loss of a step, counted from 0. Each loss gets at least one step; a single step goes to the first."""
        switch = min(max(1, round(self.share * steps)), max(1, steps - 1))
        return self.loss if step < switch else self.then

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """The values of the second loss."""
        return self.then(at, generator)
