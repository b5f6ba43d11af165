"""Prompted activations as the target (PSR, 2605.03907; IA2, 2509.22621, its first stage).

`|h(x) - h₀(x⁺)|² / d`, averaged over the answer's tokens and the layers: the adapter learns to change the states as
the prompt of the view `good` (an instruction, or demonstrations) changes them.

PSR trains a vector this way, on the residual stream. IA2 is `site="attention"` at all layers, with demonstrations as
the view, and then cross-entropy: `get_loss("prompted", site="attention", layers="all", then="cross_entropy")`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._base import At, Loss, Needs
from ._states import Site, Where, check_site, layers_of, over_layers


@dataclass(frozen=True)
class Prompted(Loss):
    """Mean squared distance from the states of the base model after another prompt.

    Args:
        layers: The layers whose states are compared, as in `SteeringVectorConfig`. A layer below all trained
            parameters has no effect.
        site: What is compared: the residual stream after the block, or what its attention or MLP writes into it.

    Raises:
        ValueError: `layers` is empty, or the site is unknown.
    """

    layers: Where = (0.4, 0.5, 0.6)
    site: Site = "block"
    needs = Needs(pairs=False, unit="token", reference=True, views=("good",), states=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", layers_of(self.layers))
        check_site(self.site)

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """`(answer tokens,)`."""
        # Layer -> states of the labelled tokens, (labelled tokens, d).
        steered = at(1.0, layers=self.layers, site=self.site).hidden
        target = at(0.0, view="good", layers=self.layers, site=self.site).hidden
        return over_layers((steered[i] - target[i]).square().mean(dim=-1) for i in steered)
