"""The floor of a training step: its matrix products alone."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from steertune.recipes.studies.timing.ways import Way, now, on_completions


def floor(model: Any, way: Way, tokens_of: tuple[float, float], layer: int) -> float:
    """Seconds of a step's bare matrix products, at the rate at which this machine multiplies matrices of these shapes.

    Counts the forward and backward passes of the layers above the vector, and of the head on labelled tokens.

    Args:
        model: The base model.
        way: The way to train.
        tokens_of: Mean tokens of a batch's prompts and of its answers (`Rows.tokens`).
        layer: Layer of the vector.
    """
    needed = products(model, way, tokens_of, layer)
    # each shape is timed once, forward and backward
    total = 0.0
    for count, weight in {(count, weight.shape): (count, weight) for count, weight in needed}.values():
        times = sum(1 for c, w in needed if (c, w.shape) == (count, weight.shape))
        total += times * (_product(count, weight) + _product(count, weight.t().contiguous()))
    return total


def products(model: Any, way: Way, tokens_of: tuple[float, float], layer: int) -> list[tuple[int, torch.Tensor]]:
    """The matrix products of a step, as number of tokens and weight; the arguments are those of `floor`."""
    # pairs share their prompt; a vector on completions leaves prompts to the cached prefix
    prompts, answers = map(round, tokens_of)
    tokens = answers if way.adapter is on_completions else prompts + answers
    blocks = model.get_decoder().layers[layer + 1 :]
    linear = [(tokens, m.weight) for block in blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    return [*linear, (answers, model.get_output_embeddings().weight)]


@torch.no_grad()
def _product(rows: int, weight: torch.Tensor) -> float:
    states = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    seconds = []
    for _ in range(7):
        start = now()
        torch.nn.functional.linear(states, weight)
        seconds.append(now() - start)
    return median(seconds[2:])
