"""What a person wants to see of a vector while it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..adapters import directions, steering_layers
from ._sharded import gathered
from ._start import pair_batches, residual_norms

if TYPE_CHECKING:
    from ._mixin import SteeringMixin

_EXAMPLES = 16  # enough for a mean norm and a reference direction to look at; a fixed small cost


class VectorVitals:
    """Norm, share of the residual norm, and cosines to the start and to the mean difference, averaged over layers."""

    def __init__(self) -> None:
        self._start: dict[int, Tensor] = {}
        self._mean_difference: dict[int, Tensor] = {}
        self._residual_norms: dict[int, float] = {}

    def start(self, trainer: SteeringMixin) -> None:
        """Remember the initial vectors, and measure the base model on at most 16 training examples."""
        vectors = _vectors(trainer.model)
        if not vectors:
            return
        self._start = vectors
        config = next(c for layer in steering_layers(trainer.model) for c in layer.config.values())
        layers = sorted(vectors)
        pairs = pair_batches(trainer, _EXAMPLES)
        if pairs:
            direction = directions.compute("mean_difference", trainer.model, pairs, layers, config.site)
            self._mean_difference, self._residual_norms = direction.vectors, direction.residual_norms
        else:
            self._residual_norms = residual_norms(trainer, layers, config.site, _EXAMPLES)

    def read(self, model: nn.Module) -> dict[str, float]:
        """The numbers to log; empty for a model without steering vectors."""
        vectors = _vectors(model)
        values: dict[str, list[float]] = {}
        for layer, vector in vectors.items():
            norm = float(vector.norm())
            values.setdefault("vector/norm", []).append(norm)
            if layer in self._residual_norms:
                values.setdefault("vector/share_of_residual", []).append(norm / self._residual_norms[layer])
            for name, others in (("init", self._start), ("mean_difference", self._mean_difference)):
                other = others.get(layer)
                if other is not None and norm > 0 and float(other.norm()) > 0:
                    values.setdefault(f"vector/cos_{name}", []).append(
                        float(torch.cosine_similarity(vector, other, dim=0))
                    )
        return {name: sum(of_layers) / len(of_layers) for name, of_layers in values.items()}


def _vectors(model: nn.Module) -> dict[int, Tensor]:
    """The first row of each layer's active write vector, on the CPU."""
    found = {}
    for layer in steering_layers(model):
        for name in layer.active_adapters:
            if name in layer.config:
                with gathered([layer.parameter(name, kind) for kind in layer.config[name].parameter_names]):
                    row = layer.written(name).detach().reshape(-1, layer.in_features)[0]
                    found[layer.layer_index] = row.cpu().clone()
    return found
