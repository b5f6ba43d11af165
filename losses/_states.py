"""What losses on hidden states share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

Where = int | float | str | tuple[int | float, ...]


def layers_of(layers: Where | list[int | float]) -> Where:
    """Layers as an option gives them (TOML has lists).

    Raises:
        ValueError: none.
    """
    found = tuple(layers) if isinstance(layers, list | tuple) else layers
    if found == ():
        raise ValueError("layers=(): a loss on hidden states compares one layer or more.")
    return found


def over_layers(values: Iterable[Tensor]) -> Tensor:
    """The mean over layers of one value a token."""
    return torch.stack(list(values)).mean(dim=0)
