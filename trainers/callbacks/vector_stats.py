"""Numbers that describe a vector while it trains: its size, and where it points."""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from ...adapters import directions, steering_layers
from ...adapters.types import Site
from ..initial_vectors import pair_batches
from ..parallel import gathered
from ..types import SteeringRun
from .base import SteeringCallback

_PAIRS = 8  # enough for a direction to compare with, at a small fixed cost


class Place(NamedTuple):
    """Where a vector is added: one layer may hold several adapters, at several sites."""

    layer: int
    site: Site
    adapter: str


class VectorStats(SteeringCallback):
    """Logs a vector's norm, share of the stream's size, and cosines to its start and to the mean difference.

    All are averaged over layers.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: SteeringRun) -> None:
        self.trainer = trainer
        self._initial: dict[Place, Tensor] = {}
        self._mean_difference: dict[Place, Tensor] = {}

    def before_train(self, trainer: SteeringRun) -> None:
        """Remember the initial vectors and the mean difference of the first training pairs, if anything is logged."""
        if trainer.args.logging_strategy == "no":
            return
        self._initial = _vectors(trainer.model)
        pairs = pair_batches(trainer, _PAIRS) if self._initial else None
        sites = {place.site for place in self._initial} if pairs else set()
        for site in (site for site in get_args(Site) if site in sites):
            places = [place for place in self._initial if place.site == site]
            layers = sorted({place.layer for place in places})
            direction = directions.compute("mean_difference", trainer.model, pairs or [], layers, site)
            self._mean_difference |= {place: direction.vectors[place.layer] for place in places}

    def extra_logs(self) -> dict[str, float]:
        """The numbers to log; none for a model without steering vectors."""
        model = self.trainer.model
        values: dict[str, list[float]] = {}  # one per layer
        for place, vector in _vectors(model).items():
            norm = float(vector.norm())
            values.setdefault("vector/norm", []).append(norm)
            if size := _stream_size(model, place):
                values.setdefault("vector/share_of_residual", []).append(norm / size)
            for name, others in (("init", self._initial), ("mean_difference", self._mean_difference)):
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
    """The first row `(d,)` of every trained write vector, on the CPU."""
    vectors = {}
    for layer in steering_layers(model):
        for name in layer.active_adapters:
            if name in layer.config and layer.parameter(name, "v").requires_grad:
                with gathered([layer.parameter(name, kind) for kind in layer.config[name].parameter_names]):
                    row = layer.written(name).detach().reshape(-1, layer.in_features)[0]
                    vectors[Place(layer.layer_index, layer.config[name].site, name)] = row.cpu().clone()
    return vectors
