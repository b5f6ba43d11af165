"""A KL to the base model on neutral text, as a term that any loss can carry.

`loss + λ KL(π(· | z) || π₀(· | z))`, averaged over the tokens of one neutral answer `z` for each example, which the
view `neutral` gives: what the adapter does to text it should leave alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._base import At, Loss, Outputs, positive
from ._states import divergence


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
        steered, base = (at(strength, view="neutral", distribution=True) for strength in (1.0, 0.0))
        added = self.neutral_kl * _per_row(steered, base)
        if self.unit == "example":
            return value + added
        # a token counts with the divergence of its row
        mask = at(1.0).mask
        per_token = added[:, None].expand(mask.shape)
        return value + (per_token[mask] if value.ndim == 1 else torch.where(mask, per_token, 0.0))


def _per_row(steered: Outputs, base: Outputs) -> Tensor:
    """Divergence of every row, per token, `(rows,)`."""
    per_token = divergence(steered, base)
    placed = per_token.new_zeros(steered.mask.shape).masked_scatter(steered.mask, per_token)
    return placed.sum(dim=1) / steered.mask.sum(dim=1).clamp_min(1)
