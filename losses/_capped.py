"""A cap on the change of the residual stream, as a term for any loss: like `norm="capped"`, but for any adapter.

`loss + λ mean_t relu(‖h_t - h⁰_t‖ / c - 1)²` over the labelled tokens of an example, where h is the output of a block
at `at(1)` and h⁰ the same at `at(0)`. A capped vector cannot change a state by more than c; with this term any other
adapter is penalised for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._base import At, positive
from ._states import Where, layers_of, over_layers
from ._wrapped import Wrapped, added, per_row


@dataclass(frozen=True)
class Capped(Wrapped):
    """A loss with a penalty on large changes of the residual stream.

    Args:
        loss: The loss.
        change_cap: The length c, in units of the residual stream.
        layers: The layers where the cap applies, as in `SteeringVectorConfig`.
        weight: The weight λ.

    Raises:
        ValueError: the cap or the weight is not greater than 0.
    """

    change_cap: float
    layers: Where = 0.67
    weight: float = 1.0

    def __post_init__(self) -> None:
        positive(change_cap=self.change_cap, cap_weight=self.weight)
        object.__setattr__(self, "layers", layers_of(self.layers))
        self._need(reference=True, states=True)

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """The values of the loss, with the penalty added."""
        value = self.loss(at, generator)
        # The length of the change of each labelled token's state, as a multiple of the cap: (labelled tokens,).
        steered, base = (at(strength, layers=self.layers) for strength in (1.0, 0.0))
        over = over_layers(
            torch.relu((steered.hidden[i] - base.hidden[i]).float().norm(dim=-1) / self.change_cap - 1) ** 2
            for i in steered.hidden
        )
        return added(value, self.weight * per_row(over, steered.mask), self.loss, steered.mask)
