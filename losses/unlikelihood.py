"""Likelihood of the chosen and unlikelihood of the rejected answer (Welleck et al. 1908.04319, equation 4).

`-(1/|y⁺|) Σ log π(y⁺_t) - (α/|y⁻|) Σ log(1 - π(y⁻_t))`, per pair: a contrast without a margin, where each side has its
own term.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._base import At, Loss, Needs, Outputs, positive

_LARGEST_LOGP = -1e-6  # bounds the unlikelihood of a certain token, which is infinite, at 13.8 nats


@dataclass(frozen=True)
class Unlikelihood(Loss):
    """Token unlikelihood on the rejected answers plus cross-entropy on the chosen ones.

    Args:
        alpha: Weight of the unlikelihood term.
    """

    alpha: float = 1.0
    needs = Needs(separable=True)

    def __post_init__(self) -> None:
        positive(alpha=self.alpha)

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """`(pairs,)`."""
        policy = at(1.0)
        rejected = policy.rejected
        unlikely = log_unlikely(rejected).sum(dim=1) / rejected.mask.sum(dim=1).clamp_min(1)
        return -policy.chosen.mean_logps - self.alpha * unlikely


def log_unlikely(outputs: Outputs) -> Tensor:
    """`log(1 - π(y_t))` of every labelled token, 0 elsewhere, `(rows, tokens)`."""
    logps = outputs.token_logps.clamp_max(_LARGEST_LOGP)
    return torch.where(outputs.mask, torch.log(-torch.expm1(logps)), 0.0)
