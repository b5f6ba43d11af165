"""Steer every row of a batch by its own vectors, with its own strengths and positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from .layer import BASE_ROW, SteeringVectorLayer, steering_layers
from .observing import base_model
from .types import Positions


@dataclass(frozen=True)
class RowVector:
    """A vector that steers one row.

    Attributes:
        adapter: Name of the adapter.
        strength: The strength of the vector in this row.
        positions: Tokens of the row that are steered; None: those of the adapter's configuration.
    """

    adapter: str
    strength: float = 1.0
    positions: Positions | None = None


@contextmanager
def steer_rows(model: nn.Module, rows: Sequence[Sequence[RowVector]]) -> Iterator[None]:
    """Steer row `i` of every forward pass inside the context by the vectors `rows[i]`, in turn, and by no others.

    Positions other than "all" need to know where each prompt ends: declare it with `prompt_length`.

    Args:
        model: A model with steering vectors; rows without vectors run on a plain model too.
        rows: The vectors of each row.

    Raises:
        ValueError: an adapter does not exist.
    """
    layers = steering_layers(model)
    adapters = {name for layer in layers for name in layer.config}
    if unknown := sorted({vector.adapter for row in rows for vector in row} - adapters):
        raise ValueError(f"The model has no steering vector {unknown[0]!r}. It has {sorted(adapters)}.")
    base = base_model(model)
    if any(vector.positions not in (None, "all") for row in rows for vector in row):
        for layer in layers:
            layer.boundary.watch(base)
    turns = [_turn(rows, number) for number in range(max(1, *map(len, rows)) if rows else 0)]
    handles = [layer.register_forward_pre_hook(partial(_first, turns[0]), with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(partial(_further, turns[1:])) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _turn(rows: Sequence[Sequence[RowVector]], number: int) -> dict[str, list[Any]]:
    """The arguments with which a steering layer steers every row by its vector `number`, if the row has so many."""
    vectors = [row[number] if number < len(row) else RowVector(BASE_ROW) for row in rows]
    return {
        "adapter_names": [vector.adapter for vector in vectors],
        "strengths": [vector.strength for vector in vectors],
        "positions": [vector.positions for vector in vectors],
    }


def _first(turn: dict[str, list[Any]], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, kwargs | turn


def _further(
    turns: Sequence[dict[str, list[Any]]], layer: SteeringVectorLayer, args: tuple[Any, ...], steered: Tensor
) -> Tensor:
    for turn in turns:
        steered = layer.forward(steered, **turn)
    return steered
