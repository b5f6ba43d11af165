"""A KL to the base model on neutral text, as a term that any loss can carry.

`loss + λ KL(π(· | z) || π₀(· | z))`, averaged over the tokens of one neutral answer `z` for each example, which the
view `neutral` gives: what the adapter does to text it should leave alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ._base import At, Loss, Outputs, positive


@dataclass(frozen=True)
class Regularised(Loss):
    """A loss and a KL to the base model.

    Args:
        loss: The loss.
        neutral_kl: Weight λ of the divergence, which is in nats per token.
    """

    loss: Loss
    neutral_kl: float
    reference = True

    def __post_init__(self) -> None:
        positive(neutral_kl=self.neutral_kl)

    @property
    def pairs(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the loss."""
        return self.loss.pairs

    @property
    def unit(self) -> Literal["example", "token"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the loss."""
        return self.loss.unit

    @property
    def scales(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the loss."""
        return self.loss.scales

    @property
    def states(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the loss."""
        return self.loss.states

    @property
    def views(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of the loss, and neutral text."""
        return (*self.loss.views, "neutral")

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """As the loss."""
        value = self.loss(at, generator)
        divergence = self.neutral_kl * _per_row(at(1.0, view="neutral", distribution=True), at)
        if self.unit == "example":
            return value + divergence
        # a token counts with the divergence of its row
        mask = at(1.0).mask
        per_token = divergence[:, None].expand(mask.shape)
        return value + (per_token[mask] if value.ndim == 1 else torch.where(mask, per_token, 0.0))


def _per_row(steered: Outputs, at: At) -> Tensor:
    """Divergence of every neutral row, per token, `(rows,)`."""
    ours: Any = steered.distribution
    base: Any = at(0.0, view="neutral", distribution=True).distribution
    per_token = (ours.exp() * (ours - base)).sum(dim=-1)
    placed = per_token.new_zeros(steered.mask.shape).masked_scatter(steered.mask, per_token)
    return placed.sum(dim=1) / steered.mask.sum(dim=1).clamp_min(1)
