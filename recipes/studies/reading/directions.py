"""The directions of a task at every layer, all of unit length and with the chosen answers on their positive side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor

from steertune.adapters import SteeringVectorConfig, directions, steering_layers
from steertune.adapters.analysis.activations import Activations, Pool, collect
from steertune.recipes.lab.batches import batches
from steertune.trainers import share_weights

RANDOM = "random"
"""Random directions are called random0, random1, ..."""
STEP = 15.0
"""Degrees between two directions of an arc."""
_BATCH = 4


def states_of(model: Any, tokenizer: Any, pairs: Dataset, layers: Sequence[int], pool: Pool) -> Activations:
    """One state for every answer and layer."""
    given: list[Mapping[str, Any]] = [
        {**batch.inputs, "labels": batch.labels} for batch in batches(tokenizer, pairs, _BATCH)
    ]
    return collect(model, given, layers, pool=pool)


def fitted(methods: Sequence[str], states: Activations, random: int, seed: int) -> dict[str, dict[int, Tensor]]:
    """Name of a direction -> layer -> unit vector `(d,)`.

    Args:
        methods: Files of `adapters/directions/`.
        states: States of the training pairs.
        random: Number of random directions at every layer.
        seed: Seed of the random directions.
    """
    vectors = {name: directions.get(name).fit(states.chosen, states.rejected) for name in methods}
    generator = torch.Generator().manual_seed(seed)
    for number in range(random):
        vectors[f"{RANDOM}{number}"] = {
            layer: torch.randn(rows_ND.shape[1], generator=generator) for layer, rows_ND in states.chosen.items()
        }
    return {
        name: {layer: _signed(vector_D.float(), states, layer) for layer, vector_D in by_layer.items()}
        for name, by_layer in vectors.items()
    }


def _signed(vector_D: Tensor, states: Activations, layer: int) -> Tensor:
    """The unit vector, with its sign fixed on the training pairs."""
    unit_D = F.normalize(vector_D, dim=0)
    gap_D = states.chosen[layer].mean(dim=0) - states.rejected[layer].mean(dim=0)
    return unit_D if float(unit_D @ gap_D) >= 0 else -unit_D


def arc(start_D: Tensor, end_D: Tensor, step: float = STEP) -> dict[float, Tensor]:
    """Unit vectors from one unit vector to another, by their angle from the first in degrees: every `step`, and the
    end."""
    cosine = float((start_D @ end_D).clamp(-1, 1))
    angle = math.acos(cosine)
    if angle < 1e-3 or math.pi - angle < 1e-3:  # the same line: no plane is spanned
        return {0.0: start_D}
    aside_D = F.normalize(end_D - cosine * start_D, dim=0)
    turns = [math.radians(step) * i for i in range(math.ceil(angle / math.radians(step)))] + [angle]
    return {round(math.degrees(t), 1): math.cos(t) * start_D + math.sin(t) * aside_D for t in turns}


def with_vectors(base: Any, vectors: Mapping[int, Tensor], **config: Any) -> Any:
    """The base model with vectors at several layers, in evaluation mode; `config` sets form and positions."""
    made = SteeringVectorConfig(layers=sorted(vectors), init="random", **config)
    model: Any = get_peft_model(share_weights(base), made)
    for layer in steering_layers(model):
        layer.initialise("default", vectors[layer.layer_index])
    return model.eval()


def projected(base: Any, vector_D: Tensor, layer: int, depth: int) -> Any:
    """The base model with a direction projected out at a layer and at all later ones, which could write it again."""
    return with_vectors(base, dict.fromkeys(range(layer, depth), vector_D), form="project")
