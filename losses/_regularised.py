"""A KL to the base model on neutral text, as a term that any loss can carry.

`loss + λ KL(π(· | z) || π₀(· | z))`, averaged over the tokens of one neutral answer `z` for each example, which the
view `neutral` gives: what the adapter does to text it should leave alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._base import At, positive
from ._states import divergence
from ._wrapped import Wrapped, added, per_row


@dataclass(frozen=True)
class Regularised(Wrapped):
    """A loss and a KL to the base model.

    Args:
        loss: The loss.
        neutral_kl: Weight λ of the divergence, which is in nats per token.

    Raises:
        ValueError: a weight that is not above 0.
    """

    neutral_kl: float

    def __post_init__(self) -> None:
        positive(neutral_kl=self.neutral_kl)
        # It never stops: the divergence of a trained model is not 0.
        self._need(reference=True, views=(*self.loss.needs.views, "neutral"), stops=False)

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """As the loss."""
        value = self.loss(at, generator)
        steered, base = (at(strength, view="neutral", distribution=True) for strength in (1.0, 0.0))
        kl = per_row(divergence(steered, base), steered.mask)
        return added(value, self.neutral_kl * kl, self.loss, at(1.0).mask)
