"""Initial vectors that come from data."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import nn

from ..adapters import directions, steering_layers
from ..adapters.analysis import activations
from ..adapters.types import Layers, Site
from .types import SteeringRun

_ROWS = 8  # examples per forward pass while activations are read


def fill_missing_vectors(trainer: SteeringRun) -> None:
    """Compute the direction of every new adapter whose `init` needs data, and the residual norms of `norm="relative"`.

    Raises:
        ValueError: the training data are not pairs.
    """
    model = trainer.model
    configs = {name: config for layer in steering_layers(model) for name, config in layer.config.items()}
    for name, config in configs.items():
        layers = steering_layers(model, name)
        missing = any(not torch.isfinite(layer.parameter(name, "v")).all() for layer in layers)
        if missing and config.init_from_data:
            batches = pair_batches(trainer)
            if batches is None:
                raise ValueError(
                    f"init={config.init!r} is computed from pairs (chosen, rejected), but the training data have "
                    "none. Use init='zeros', or compute a direction from other data and write it (directions.compute)."
                )
            directions.compute(config.init, model, batches, config.layers, config.site).write(model, name)
        elif config.norm == "relative" and not config.residual_norms:
            norms = residual_norms(trainer, config.layers, config.site, 2 * _ROWS)
            config.residual_norms = {str(layer): norm for layer, norm in norms.items()}
            for layer in layers:
                layer.fit_length(name)


def pair_batches(trainer: SteeringRun, limit: int | None = None) -> list[Mapping[str, Any]] | None:
    """Collate the training pairs, in the order of the data set; None if the data are not pairs."""
    batches = first_batches(trainer, limit)
    return batches if batches and "completion_mask" in batches[0] else None


def residual_norms(trainer: SteeringRun, layers: Layers, site: Site, limit: int) -> dict[int, float]:
    """Mean norm of the base model's residual stream on the first `limit` training examples; empty for a stream."""
    batches = first_batches(trainer, limit)
    return activations.residual_norms(trainer.model, batches, layers, site) if batches else {}


def first_batches(trainer: SteeringRun, limit: int | None = None) -> list[Mapping[str, Any]]:
    """Collate the first `limit` training examples (all if None); an empty list for a stream."""
    dataset = trainer.train_dataset
    if not isinstance(dataset, Sized):
        return []
    rows = [dataset[i] for i in range(min(len(dataset), limit or len(dataset)))]  # pyright: ignore[reportIndexIssue]
    size = 1 if rows and "seq_lengths" in rows[0] else _ROWS  # packed rows are full already
    return [trainer.data_collator(rows[i : i + size]) for i in range(0, len(rows), size)]


@torch.no_grad()
def to_fp32(model: nn.Module) -> None:
    """Make steering vectors fp32 whatever the base: a bf16 vector ignores steps below 1/256 of its size."""
    for layer in steering_layers(model):
        for parameter in layer.parameters():
            parameter.data = parameter.data.float()
