"""SPLIT, steering with a preference and a utility term (Xu et al. 2602.02343, section 5).

`λp CE(y⁺) + λn CE(y⁻) + γ max(0, θ - [CE(y⁻) - CE(y⁺)])`, with `CE` the negative log-likelihood per token.

The utility terms keep both answers likely, and the preference term makes the chosen one more likely than the rejected
one by a margin θ. The same steered model reads both answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._base import At, Loss, finite, positive


@dataclass(frozen=True)
class Split(Loss):
    """Utility of both answers and a hinge on their difference.

    Args:
        chosen: Weight λp of the chosen answer's likelihood.
        rejected: Weight λn of the rejected answer's likelihood.
        gamma: Weight γ of the preference.
        theta: Margin θ, in nats per token.
    """

    chosen: float = 1.0
    rejected: float = 0.6
    gamma: float = 4.0
    theta: float = 0.5

    def __post_init__(self) -> None:
        positive(gamma=self.gamma)
        finite(chosen=self.chosen, rejected=self.rejected, theta=self.theta)

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """`(pairs,)`."""
        policy = at(1.0)
        chosen, rejected = -policy.chosen.mean_logps, -policy.rejected.mean_logps
        preference = (self.theta - (rejected - chosen)).clamp_min(0)
        return self.chosen * chosen + self.rejected * rejected + self.gamma * preference
