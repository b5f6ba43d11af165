"""Helpers for losses on hidden states and on distributions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from ._base import Outputs

Site = Literal["block", "attention", "mlp"]
Where = int | float | str | tuple[int | float, ...]


def layers_of(layers: Where | list[int | float]) -> Where:
    """Check an option that names layers, and convert a list to a tuple.

    Raises:
        ValueError: `layers` is empty, or one of them is neither an index, a fraction of the depth nor "all".
    """
    chosen = tuple(layers) if isinstance(layers, list | tuple) else layers
    if chosen == ():
        raise ValueError("layers=(): a loss on hidden states needs at least one layer.")
    for layer in chosen if isinstance(chosen, tuple) else (chosen,) if chosen != "all" else ():
        number = isinstance(layer, int | float) and not isinstance(layer, bool) and layer >= 0
        if not number or (isinstance(layer, float) and layer >= 1):
            raise ValueError(
                f"layers={layers!r}: {layer!r} must be an index from 0, a fraction of the depth in [0, 1), or 'all'."
            )
    return chosen


def check_site(site: str) -> None:
    """Raise a ValueError for a site that does not exist."""
    if site not in get_args(Site):
        raise ValueError(f"site={site!r} must be one of {get_args(Site)}.")


def divergence(p: Outputs, q: Outputs) -> Tensor:
    """`KL(p || q)` of every labelled token, in nats, `(labelled tokens,)`."""
    assert p.distribution is not None and q.distribution is not None
    return (p.distribution.exp() * (p.distribution - q.distribution)).sum(dim=-1)


def over_layers(values: Iterable[Tensor]) -> Tensor:
    """The mean over layers of one value per token, `(tokens,)` each."""
    return torch.stack(list(values)).mean(dim=0)
