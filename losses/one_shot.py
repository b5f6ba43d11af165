"""One-shot optimisation of a steering vector (Dunefsky and Cohan 2502.18862, section 3).

Promotion raises every token of the chosen answer, suppression lowers every token of the rejected one:

    promotion     -Σ log π(y⁺_t)
    suppression   -Σ log(1 - π(y⁻_t))
    mixed         both

With `satisfice`, the chosen answer is promoted only until it is as likely as the rejected one is for the base model:
`max(0, -Σ log π(y⁺_t) + Σ log π₀(y⁻_t))`. Training stops once this is 0 on every example. The paper uses the answer of
the base model itself; that is the same if the rejected answers are what the base model says.
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
    """Sums over tokens, not means: made for one pair, or for a few of similar length.

    Args:
        mode: The side that is optimised.
        satisfice: Stop once the chosen answer is as likely as the rejected one is for the base model.

    Raises:
        ValueError: the mode is unknown, or promotes nothing that `satisfice` could stop.
    """

    mode: Mode = "promotion"
    satisfice: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("promotion", "suppression", "mixed"):
            raise ValueError(f"mode={self.mode!r} must be one of 'promotion', 'suppression', 'mixed'.")
        if self.satisfice and self.mode == "suppression":
            raise ValueError(
                "satisfice=True stops promotion, and mode='suppression' promotes nothing. Leave one of them out."
            )
        # Satisficing compares with the reference, and training ends at 0, which a suppression never reaches.
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
