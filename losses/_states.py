"""What losses on hidden states and on distributions share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from ._base import Outputs

Site = Literal["block", "attention", "mlp"]
Where = int | float | str | tuple[int | float, ...]


def layers_of(layers: Where | list[int | float]) -> Where:
    """Layers as an option gives them (TOML has lists).

    Raises:
        ValueError: no layer, or one that is neither an index, a fraction of the depth nor "all".
    """
    found = tuple(layers) if isinstance(layers, list | tuple) else layers
    if found == ():
        raise ValueError("layers=(): a loss on hidden states compares one layer or more.")
    for layer in found if isinstance(found, tuple) else (found,) if found != "all" else ():
        number = isinstance(layer, int | float) and not isinstance(layer, bool) and layer >= 0
        if not number or (isinstance(layer, float) and layer >= 1):
            raise ValueError(
                f"layers={layers!r}: {layer!r} is none of an index from 0, a fraction of the depth in [0, 1), 'all'."
            )
    return found


def check_site(site: str) -> None:
    """Raise a ValueError for a site that does not exist."""
    if site not in get_args(Site):
        raise ValueError(f"site={site!r} is none of {get_args(Site)}.")


def divergence(p: Outputs, q: Outputs) -> Tensor:
    """`KL(p || q)` of every labelled token, in nats, `(labelled tokens,)`."""
    assert p.distribution is not None and q.distribution is not None  # they were asked for
    return (p.distribution.exp() * (p.distribution - q.distribution)).sum(dim=-1)


def over_layers(values: Iterable[Tensor]) -> Tensor:
    """The mean over layers of one value a token."""
    return torch.stack(list(values)).mean(dim=0)
