"""A KL divergence from the base model on neutral text, a term for any loss.

`loss + λ KL(π(· | z) || π₀(· | z))`, averaged over the tokens of one neutral answer `z` per example, which comes
from the view `neutral`. It keeps the adapter from changing text that it should leave alone. With the root mean square
in place of the mean, a few tokens that change a lot cost more than many that change a little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ._base import At, positive
from ._states import divergence
from ._wrapped import Wrapped, added, per_row

Average = Literal["mean", "rms"]
_SMALL = 1e-12


@dataclass(frozen=True)
class Regularised(Wrapped):
    """A loss with a KL divergence from the base model.

    Args:
        loss: The loss.
        neutral_kl: Weight λ of the divergence, which is in nats per token.
        average: Over the tokens of an answer: `mean`, or `rms`, the root mean square.

    Raises:
        ValueError: the weight is not greater than 0, or the average is unknown.
    """

    neutral_kl: float
    average: Average = "mean"

    def __post_init__(self) -> None:
        positive(neutral_kl=self.neutral_kl)
        if self.average not in get_args(Average):
            raise ValueError(f"neutral_average={self.average!r} must be 'mean' or 'rms'.")
        # The divergence of a trained model is not 0, so the sum never is.
        self._need(reference=True, views=(*self.loss.needs.views, "neutral"), stops=False)

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """The values of the loss, with the divergence added."""
        value = self.loss(at, generator)
        steered, base = (at(strength, view="neutral", distribution=True) for strength in (1.0, 0.0))
        kl_L = divergence(steered, base)  # of every labelled token
        if self.average == "mean":
            kl = per_row(kl_L, steered.mask)
        else:
            # where nothing has changed yet, the root itself has no gradient
            kl = (per_row(kl_L.square(), steered.mask) + _SMALL).sqrt() - _SMALL**0.5
        return added(value, self.neutral_kl * kl, self.loss, at(1.0).mask)
