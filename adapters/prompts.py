"""Declare where prompts end, for forward passes that do not say so themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .layer import steering_layers


@contextmanager
def prompt_length(model: nn.Module, length: int | Tensor) -> Iterator[None]:
    """Declare where the prompt ends in every forward pass inside the block.

    Args:
        model: A model with steering vectors.
        length: The number of leading columns that belong to the prompt, including left padding: one number, or a
            tensor `(rows,)`.
    """
    with _declare(model, "declared", length):
        yield


@contextmanager
def prompts_by_labels(model: nn.Module, labels: Tensor) -> Iterator[None]:
    """Use these labels to find where prompts end in every forward pass inside the block, as if the model got them.

    Args:
        model: A model with steering vectors.
        labels: -100 on the prompts, `(rows, columns)`.
    """
    with _declare(model, "declared_labels", labels):
        yield


@contextmanager
def _declare(model: nn.Module, name: str, value: Any) -> Iterator[None]:
    boundaries = {id(layer.boundary): layer.boundary for layer in steering_layers(model)}
    before = {key: getattr(boundary, name) for key, boundary in boundaries.items()}
    for boundary in boundaries.values():
        setattr(boundary, name, value)
    try:
        yield
    finally:
        for key, boundary in boundaries.items():
            setattr(boundary, name, before[key])
