"""Initial vectors that come from data, and the numbers training is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapters import directions, steering_layers
from ..adapters.analysis import activations
from ..adapters.types import Layers, Site

if TYPE_CHECKING:
    from ._mixin import SteeringMixin

_ROWS = 8  # examples per forward pass while activations are read


def fill_missing_vectors(trainer: SteeringMixin) -> None:
    """Compute the direction of every adapter whose `init` needs data and that has none yet; the same for the residual
    norms of `norm="relative"`.

    Raises:
        ValueError: the training data are no pairs.
    """
    for name, config in _steering_configs(trainer.model).items():
        layers = steering_layers(trainer.model, name)
        missing = any(not torch.isfinite(layer.parameter(name, "v")).all() for layer in layers)
        if missing and config.init_from_data:
            batches = pair_batches(trainer)
            if batches is None:
                raise ValueError(
                    f"init={config.init!r} is computed from pairs (chosen, rejected); the training data have none. "
                    "Use init='zeros', or compute the direction from other data and write it (directions.compute)."
                )
            directions.compute(config.init, trainer.model, batches, config.layers, config.site).write(
                trainer.model, name
            )
        elif config.norm == "relative" and not config.residual_norms:
            norms = residual_norms(trainer, config.layers, config.site, 2 * _ROWS)
            config.residual_norms = {str(layer): norm for layer, norm in norms.items()}
            for layer in layers:
                layer.fit_length(name)


def pair_batches(trainer: SteeringMixin, limit: int | None = None) -> list[Mapping[str, Any]] | None:
    """Training pairs in collated batches, in the order of the data set; None if they are no pairs."""
    batches = first_batches(trainer, limit)
    return batches if batches and "completion_mask" in batches[0] else None


def residual_norms(trainer: SteeringMixin, layers: Layers, site: Site, limit: int) -> dict[int, float]:
    """Mean norm of the base model's residual stream on the first `limit` training examples; empty for a stream."""
    batches = first_batches(trainer, limit)
    return activations.residual_norms(trainer.model, batches, layers, site) if batches else {}


def first_batches(trainer: SteeringMixin, limit: int | None = None) -> list[Mapping[str, Any]]:
    """The first `limit` training examples (all if None), collated."""
    dataset: Any = trainer.train_dataset
    if dataset is None or not hasattr(dataset, "__len__"):
        return []
    rows = [dataset[i] for i in range(min(len(dataset), limit or len(dataset)))]
    size = 1 if rows and "seq_lengths" in rows[0] else _ROWS  # packed rows are full already
    return [trainer.data_collator(rows[i : i + size]) for i in range(0, len(rows), size)]


def _steering_configs(model: nn.Module) -> dict[str, Any]:
    return {name: config for layer in steering_layers(model) for name, config in layer.config.items()}
