"""Initial vectors that come from data, and the numbers training is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapters import SteeringVectorLayer, directions

if TYPE_CHECKING:
    from ._mixin import SteeringMixin

_ROWS = 8  # examples per forward pass while activations are read


def steering_layers(model: nn.Module) -> list[SteeringVectorLayer]:
    """Every steering layer of a model."""
    return [module for module in model.modules() if isinstance(module, SteeringVectorLayer)]


def fill_missing_vectors(trainer: SteeringMixin) -> None:
    """Compute the direction of every adapter whose `init` needs data and that has none yet; the same for the residual
    norms of `norm="relative"`.

    Raises:
        ValueError: the training data are no pairs.
    """
    for name, config in _steering_configs(trainer.model).items():
        layers = [layer for layer in steering_layers(trainer.model) if name in layer.config]
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
            batches = first_batches(trainer, 2 * _ROWS)
            norms = directions.collect(trainer.model, batches, config.layers, config.site).residual_norms
            config.residual_norms = {str(layer): norm for layer, norm in norms.items()}


def pair_batches(trainer: SteeringMixin, limit: int | None = None) -> list[Mapping[str, Any]] | None:
    """Training pairs in collated batches, in the order of the data set; None if they are no pairs."""
    batches = first_batches(trainer, limit)
    return batches if batches and "completion_mask" in batches[0] else None


def first_batches(trainer: SteeringMixin, limit: int | None = None) -> list[Mapping[str, Any]]:
    """The first `limit` training examples (all if None), collated."""
    dataset: Any = trainer.train_dataset
    if dataset is None or not hasattr(dataset, "__len__"):
        return []
    rows = [dataset[i] for i in range(min(len(dataset), limit or len(dataset)))]
    return [trainer.data_collator(rows[i : i + _ROWS]) for i in range(0, len(rows), _ROWS)]


def _steering_configs(model: nn.Module) -> dict[str, Any]:
    return {name: config for layer in steering_layers(model) for name, config in layer.config.items()}
