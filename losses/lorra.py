"""LoRRA, low-rank representation adaptation (Zou et al. 2310.01405, section 3.2.2 and algorithm 1).

`|h(x) - [h₀(x) + α (h₀(x⁺) - h₀(x⁻))]|`, averaged over the answer's tokens and the layers.

`x⁺` and `x⁻` are views of the example: the same answer after a prompt that asks for the behaviour, and after one that
asks for its opposite. So the model learns to do unasked what it can already do when asked, and no labels are needed
for which answer is good. It trains any adapter; on a steering vector it is activation addition by SGD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._base import At, Loss, Needs, finite
from ._states import Where, layers_of, over_layers


@dataclass(frozen=True)
class LoRRA(Loss):
    """Distance from the states of the base model, shifted by the contrast of two views.

    Args:
        alpha: The size α of the shift.
        layers: The layers whose states are compared, as in `SteeringVectorConfig`. A layer below all trained
            parameters has no effect.
    """

    alpha: float = 5.0
    layers: Where = (0.4, 0.5, 0.6)
    needs = Needs(pairs=False, unit="token", reference=True, views=("good", "bad"), states=True)

    def __post_init__(self) -> None:
        finite(alpha=self.alpha)
        object.__setattr__(self, "layers", layers_of(self.layers))

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """`(answer tokens,)`."""
        # Layer -> states of the labelled tokens, (labelled tokens, d).
        steered, base = at(1.0, layers=self.layers).hidden, at(0.0, layers=self.layers).hidden
        good, bad = (at(0.0, view=view, layers=self.layers).hidden for view in ("good", "bad"))
        return over_layers(
            torch.linalg.vector_norm(steered[i] - base[i] - self.alpha * (good[i] - bad[i]), dim=-1) for i in steered
        )
