"""The one idea: a loss is a function of the same model steered at different strengths.

`at(1)` is the model being trained, `at(0)` the reference it starts from, `at(-1)` its opposite. A loss never sees a
model, so a test needs only a plain function in place of one.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ._needs import Needs, SingleAttributes


@dataclass(frozen=True)
class Outputs:
    """The outputs of the model at one strength, for the labelled tokens of a batch.

    Attributes:
        token_logps: Log-probability (nats) of each labelled token given the tokens before it, `(rows, tokens)`;
            0 at tokens without a label.
        mask: True on labelled tokens, `(rows, tokens)`.
        hidden: Layer -> output of its block at the positions that predict a labelled token, `(labelled tokens, d)`,
            row after row; only for the layers that `at` was called with.
        distribution: Log-probabilities of the whole vocabulary at the same positions, `(labelled tokens, vocabulary)`,
            if `at` was called with `distribution=True`.
    """

    token_logps: Tensor
    mask: Tensor
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    distribution: Tensor | None = None

    @cached_property
    def logps(self) -> Tensor:
        """Log-probability of each row's answer, `(rows,)`."""
        return self.token_logps.sum(dim=1)

    @cached_property
    def mean_logps(self) -> Tensor:
        """Mean log-probability of the tokens of each row's answer, `(rows,)`."""
        return self.logps / self.mask.sum(dim=1).clamp_min(1)

    @property
    def chosen(self) -> Outputs:
        """The first half of the rows of a pair batch."""
        half = len(self.mask) // 2
        return Outputs(self.token_logps[:half], self.mask[:half])

    @property
    def rejected(self) -> Outputs:
        """The second half of the rows of a pair batch."""
        half = len(self.mask) // 2
        return Outputs(self.token_logps[half:], self.mask[half:])


At = Callable[..., Outputs]
"""`at(strength, view="", layers=(), distribution=False, site="block")`: what the model computes for the batch with its
adapter scaled by `strength`, or with the direction of its vector removed from its states ("null").

`view` names another version of the same examples (see `steertune.trainers.views`). `layers` also returns hidden
states of the residual stream or of what `site` "attention" or "mlp" writes into it; `distribution` also returns
log-probabilities of the whole vocabulary. Results are cached: repeated calls cost nothing."""


class Loss(SingleAttributes, ABC):
    """A training loss. Subclasses are frozen dataclasses of their hyperparameters, one file each.

    Attributes:
        needs: What it needs from the trainer. A subclass sets this in its body, or in `__post_init__` if it depends on
            hyperparameters.
    """

    needs: Needs = Needs()

    @abstractmethod
    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each unit, 0 if it has no label. The caller sums them and divides by the number of units.

        Args:
            at: The batch at a strength.
            generator: Source of random numbers, the same on every process of a distributed run.
        """


def reference_margin(at: At, strength: float = 1.0) -> Tensor:
    """By how much the model prefers the chosen answer more than the reference does, in nats, `(pairs,)`:

    `[log π(y⁺) - log π₀(y⁺)] - [log π(y⁻) - log π₀(y⁻)]`
    """
    policy, reference = at(strength), at(0.0)
    return (policy.chosen.logps - reference.chosen.logps) - (policy.rejected.logps - reference.rejected.logps)


def positive(**values: float) -> None:
    """Raise a ValueError unless every hyperparameter is a finite number greater than 0."""
    finite(**values)
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name}={value!r} must be above 0.")


def finite(**values: float) -> None:
    """Raise a ValueError unless every hyperparameter is a finite number."""
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name}={value!r:.80} must be a finite number.")
