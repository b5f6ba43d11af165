"""IPO (Azar et al. 2310.12036, equation 17), with log-probabilities per token, as its authors confirmed to TRL.

`(m - 1/(2β))²`, with `m = [log π(y⁺) - log π₀(y⁺)] / |y⁺| - [log π(y⁻) - log π₀(y⁻)] / |y⁻|`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._base import At, Loss, Needs, positive


@dataclass(frozen=True)
class IPO(Loss):
    """Squared distance of the per-token margin from `1/(2β)`, which it does not exceed.

    Args:
        beta: Regularisation (τ in the paper); the target margin is `1/(2β)` nats per token.
    """

    beta: float = 0.1
    needs = Needs(reference=True)

    def __post_init__(self) -> None:
        positive(beta=self.beta)

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """`(pairs,)`."""
        policy, base = at(1.0), at(0.0)
        chosen = policy.chosen.mean_logps - base.chosen.mean_logps
        rejected = policy.rejected.mean_logps - base.rejected.mean_logps
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2
