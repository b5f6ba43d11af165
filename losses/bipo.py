"""BiPO, bi-directional preference optimisation (Cao et al. 2406.00045, equation 3).

`-log σ(d β m(d))`, with `m(d)` the DPO margin of the model steered at strength `d`, and `d` drawn from {-1, +1}:
adding the vector has to raise the chosen answer as much as subtracting the vector lowers it. Like the released code,
this draws `d` once per batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._base import At, Loss, Needs, positive, reference_margin


@dataclass(frozen=True)
class BiPO(Loss):
    """DPO in both directions of the vector.

    Args:
        beta: As in DPO.
    """

    beta: float = 0.1
    needs = Needs(reference=True, strengths=(-1.0,))

    def __post_init__(self) -> None:
        positive(beta=self.beta)

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """`(pairs,)`."""
        d = 2.0 * int(torch.randint(2, (), generator=generator)) - 1.0
        return -logsigmoid(d * self.beta * reference_margin(at, d))
