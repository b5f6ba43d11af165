"""One-shot optimisation of a steering vector (Dunefsky and Cohan 2502.18862, section 3).

Promotion raises every token of the chosen answer, suppression lowers every token of the rejected one:

    promotion     -Σ log π(y⁺_t)
    suppression   -Σ log(1 - π(y⁻_t))
    mixed         both

With `satisfice` the chosen answer is promoted only until it is as likely as the base model finds the rejected one:
`max(0, -Σ log π(y⁺_t) + Σ log π₀(y⁻_t))`. Once that is 0 on every example the training stops. The paper takes the
base's own answer; here that is so where the rejected answers are what the base says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ._base import At, Loss
from .unlikelihood import log_unlikely

Mode = Literal["promotion", "suppression", "mixed"]


@dataclass(frozen=True)
class OneShot(Loss):
    """Sums over tokens, not means: made for one pair, or a few of similar length.

    Args:
        mode: Which side is optimised.
        satisfice: Promote no further than the rejected answer is likely for the base model, and stop there.

    Raises:
        ValueError: an unknown mode, or `satisfice` with nothing to promote.
    """

    mode: Mode = "promotion"
    satisfice: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("promotion", "suppression", "mixed"):
            raise ValueError(f"mode={self.mode!r} is none of 'promotion', 'suppression', 'mixed'.")
        if self.satisfice and self.mode == "suppression":
            raise ValueError("satisfice=True stops promotion; mode='suppression' promotes nothing.")
        # Satisficing compares with the reference, and training ends at 0 unless a suppression, never 0, is part of it.
        stops = self.satisfice and self.mode == "promotion"
        needs = replace(self.needs, reference=self.satisfice, separable=not self.satisfice, stops=stops)
        object.__setattr__(self, "needs", needs)

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """`(pairs,)`."""
        policy = at(1.0)
        promotion = -policy.chosen.logps
        if self.satisfice:
            promotion = (promotion + at(0.0).rejected.logps).clamp_min(0)
        suppression = -log_unlikely(policy.rejected).sum(dim=1)
        return {"promotion": promotion, "suppression": suppression, "mixed": promotion + suppression}[self.mode]
