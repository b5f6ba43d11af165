"""Context distillation (Askell et al. 2112.00861, section 2; Snell et al. 2209.15189).

`KL(π₀(· | x⁺, y_<t) || π(· | x, y_<t))`, averaged over the answer's tokens: without the prompt of the view `good`, the
model learns to say what the base model says with it. The answers come from the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._base import At, Loss, Needs
from ._states import divergence


@dataclass(frozen=True)
class ContextDistillation(Loss):
    """Divergence from the distributions of the base model after another prompt."""

    needs = Needs(pairs=False, unit="token", reference=True, views=("good",))

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """`(answer tokens,)`, in nats."""
        return divergence(at(0.0, view="good", distribution=True), at(1.0, distribution=True))
