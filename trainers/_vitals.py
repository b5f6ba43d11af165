"""What a person wants to see of a vector while it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..adapters import directions, steering_layers
from ..adapters.types import Site
from ._sharded import gathered
from ._start import pair_batches

if TYPE_CHECKING:
    from ._mixin import SteeringMixin

_PAIRS = 8  # enough for a direction to look at; a fixed small cost


class Place(NamedTuple):
    """Where a vector is added: one layer may hold several adapters, at several sites."""

    layer: int
    site: Site
    adapter: str


class VectorVitals:
    """Norm, share of the stream's size, and cosines to the start and to the mean difference, averaged over layers."""

    def __init__(self) -> None:
        self._start: dict[Place, Tensor] = {}
        self._mean_difference: dict[Place, Tensor] = {}

    def start(self, trainer: SteeringMixin) -> None:
        """Remember the initial vectors, and the mean difference of the first training pairs."""
        self._start = _vectors(trainer.model)
        pairs = pair_batches(trainer, _PAIRS) if self._start else None
        sites = {place.site for place in self._start} if pairs else set()
        for site in (site for site in get_args(Site) if site in sites):
            places = [place for place in self._start if place.site == site]
            layers = sorted({place.layer for place in places})
            direction = directions.compute("mean_difference", trainer.model, pairs or [], layers, site)
            self._mean_difference |= {place: direction.vectors[place.layer] for place in places}

    def read(self, model: nn.Module) -> dict[str, float]:
        """The numbers to log; empty for a model without steering vectors."""
        values: dict[str, list[float]] = {}
        for place, vector in _vectors(model).items():
            norm = float(vector.norm())
            values.setdefault("vector/norm", []).append(norm)
            if size := _stream_size(model, place):
                values.setdefault("vector/share_of_residual", []).append(norm / size)
            for name, others in (("init", self._start), ("mean_difference", self._mean_difference)):
                other = others.get(place)
                if other is not None and norm > 0 and float(other.norm()) > 0:
                    values.setdefault(f"vector/cos_{name}", []).append(
                        float(torch.cosine_similarity(vector, other, dim=0))
                    )
        return {name: sum(of_layers) / len(of_layers) for name, of_layers in values.items()}


def _stream_size(model: nn.Module, place: Place) -> float | None:
    """Typical size of the residual stream where a vector is written, if it was measured."""
    configs = [layer.config[place.adapter] for layer in steering_layers(model, place.adapter)]
    return (configs[0].stream_sizes or {}).get(str(place.layer)) if configs else None


def _vectors(model: nn.Module) -> dict[Place, Tensor]:
    """The first row `(d,)` of every write vector that is trained, on the CPU."""
    vectors = {}
    for layer in steering_layers(model):
        for name in layer.active_adapters:
            if name in layer.config and layer.parameter(name, "v").requires_grad:
                with gathered([layer.parameter(name, kind) for kind in layer.config[name].parameter_names]):
                    row = layer.written(name).detach().reshape(-1, layer.in_features)[0]
                    vectors[Place(layer.layer_index, layer.config[name].site, name)] = row.cpu().clone()
    return vectors
