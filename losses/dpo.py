"""DPO (Rafailov et al. 2305.18290, equation 7).

`-log σ(β m)`, with `m` the margin over the reference: `[log π(y⁺) - log π₀(y⁺)] - [log π(y⁻) - log π₀(y⁻)]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._base import At, Loss, Needs, positive, reference_margin


@dataclass(frozen=True)
class DPO(Loss):
    """Sigmoid DPO; its value is ln 2 while the model equals its reference.

    Args:
        beta: Inverse temperature β of the margin, in 1/nats.
    """

    beta: float = 0.1
    needs = Needs(reference=True)

    def __post_init__(self) -> None:
        positive(beta=self.beta)

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """`(pairs,)`."""
        return -logsigmoid(self.beta * reference_margin(at))
