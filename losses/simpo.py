"""SimPO (Meng, Xia, Chen 2405.14734, equation 6): no reference model.

`-log σ(β [log π(y⁺)/|y⁺| - log π(y⁻)/|y⁻|] - γ)`
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._base import At, Loss, finite, positive


@dataclass(frozen=True)
class SimPO(Loss):
    """Preference by log-probability per token.

    Args:
        beta: Scale of the per-token margin, in 1/nats (2.0 to 2.5 in the paper).
        gamma: Target margin after scaling (0.5 to 0.8 times beta in the paper); TRL calls it `simpo_gamma`.
    """

    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        positive(beta=self.beta)
        finite(gamma=self.gamma)

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """`(pairs,)`."""
        policy = at(1.0)
        return -logsigmoid(self.beta * (policy.chosen.mean_logps - policy.rejected.mean_logps) - self.gamma)
