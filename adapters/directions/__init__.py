"""Directions in closed form: steering vectors that need no training.

Each file of this folder is one method, named by the file. It defines `POOL` (the tokens that represent an answer)
and

    fit(chosen, rejected) -> {layer: direction}

over dictionaries layer -> `(pairs, d)`. A new file is a new method: `init="<file>"` finds it.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.activations import Pool, collect
from ..layer import SteeringVectorLayer
from ..registry import choose, file_names
from ..types import Layers, Site


@dataclass(frozen=True)
class Direction:
    """A fitted direction, without the data and the method that made it.

    Attributes:
        method: File name of the method.
        vectors: Layer index -> direction `(d,)`, fp32, with the method's own length.
        residual_norms: Layer index -> mean norm of the residual stream at the same place.
        site: Where the activations were read.
        pool: Which tokens represent an answer.
        pairs: Number of contrast pairs.
        data_sha256: Hash of the token ids they came from.
    """

    method: str
    vectors: dict[int, Tensor]
    residual_norms: dict[int, float]
    site: Site
    pool: Pool
    pairs: int
    data_sha256: str

    @property
    def norms(self) -> dict[int, float]:
        """Length of the direction per layer, in units of the residual stream."""
        return {layer: float(vector.norm()) for layer, vector in self.vectors.items()}

    def write(self, model: nn.Module, adapter_name: str | None = None) -> None:
        """Set a steering vector to this direction: activation addition without training, or a start for training.

        The written vector is the direction times the adapter's `init_scale`. The adapter also gets the residual norms
        that `norm="relative"` needs.

        Args:
            model: A model with steering vectors.
            adapter_name: The adapter; None for the only one, or for the one named "default".

        Raises:
            ValueError: the model has no such steering vector, or has one at a layer that the direction does not cover.
        """
        steering = [m for m in model.modules() if isinstance(m, SteeringVectorLayer)]
        if adapter_name is None:
            adapters = {name for layer in steering for name in layer.config}
            adapter_name = adapters.pop() if len(adapters) == 1 else "default"
        layers = [layer for layer in steering if adapter_name in layer.config]
        missing = [layer.layer_index for layer in layers if layer.layer_index not in self.vectors]
        if not layers or missing:
            raise ValueError(
                f"Direction {self.method!r} covers layers {sorted(self.vectors)}; adapter {adapter_name!r} has "
                f"{'no steering layer' if not layers else f'layers {missing} too'}."
            )
        for layer in layers:
            layer.config[adapter_name].residual_norms = {str(i): n for i, n in self.residual_norms.items()}
            if adapter_name not in layer.tied_to:
                layer.initialise(adapter_name, self.vectors[layer.layer_index])


def names() -> list[str]:
    """The names of all methods: the files of this folder that do not start with an underscore."""
    return file_names(__path__[0])


def get(name: str) -> ModuleType:
    """The module of a method, with `POOL` and `fit`.

    Raises:
        ValueError: the name is unknown; the message suggests the nearest one.
    """
    choose("direction", name, names())
    return importlib.import_module(f"{__name__}.{name}")


def compute(
    name: str,
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    layers: Layers = "all",
    site: Site = "block",
    pool: Pool | None = None,
) -> Direction:
    """Fit direction `name` on contrast pairs.

    Args:
        name: One of `names()`.
        model: The model to be steered; its adapters are disabled while activations are collected.
        batches: As for `adapters.analysis.activations.collect`.
        layers: The layers to cover, as in `SteeringVectorConfig`.
        site: The site to read, as in `SteeringVectorConfig`.
        pool: The tokens that represent an answer; None for the method's own choice.
    """
    method = get(name)
    activations = collect(model, batches, layers, site, pool or method.POOL)
    vectors = method.fit(activations.chosen, activations.rejected)
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(torch.as_tensor(batch["input_ids"]).cpu().numpy().tobytes())
    return Direction(
        method=name,
        vectors={i: v.float() for i, v in vectors.items()},
        residual_norms=activations.residual_norms,
        site=site,
        pool=activations.pool,
        pairs=len(next(iter(activations.chosen.values()))),
        data_sha256=digest.hexdigest(),
    )
