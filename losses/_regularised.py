"""A KL divergence from the base model on neutral text, a term for any loss.

`loss + λ KL(π(· | z) || π₀(· | z))`, averaged over the tokens of one neutral answer `z` per example, which comes
from the view `neutral`. It keeps the adapter from changing text that it should leave alone.
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
    """A loss with a KL divergence from the base model.

    Args:
        loss: The loss.
        neutral_kl: Weight λ of the divergence, which is in nats per token.

    Raises:
        ValueError: the weight is not greater than 0.
    """

    neutral_kl: float

    def __post_init__(self) -> None:
        positive(neutral_kl=self.neutral_kl)
        # The divergence of a trained model is not 0, so the sum never is.
        self._need(reference=True, views=(*self.loss.needs.views, "neutral"), stops=False)

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """Like the loss."""
        value = self.loss(at, generator)
        steered, base = (at(strength, view="neutral", distribution=True) for strength in (1.0, 0.0))
        kl = per_row(divergence(steered, base), steered.mask)
        return added(value, self.neutral_kl * kl, self.loss, at(1.0).mask)
