"""A loss that wraps another loss, and extends its needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._base import Loss


@dataclass(frozen=True)
class Wrapped(Loss):
    """A loss that adds a term to another loss, or changes what that loss sees.

    Args:
        loss: The inner loss.
    """

    loss: Loss

    def _need(self, **changes: Any) -> None:
        """Set `needs` to those of the inner loss with these changes."""
        object.__setattr__(self, "needs", replace(self.loss.needs, **changes))


def parts(loss: Loss) -> list[Loss]:
    """A loss and all losses inside it, the innermost last."""
    inner = [value for value in vars(loss).values() if isinstance(value, Loss)]
    return [loss, *(part for child in reversed(inner) for part in parts(child))]


def per_row(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the labelled tokens of every row, `(rows,)`.

    Args:
        values: One number per labelled token, row after row, `(labelled tokens,)`.
        mask: True on labelled tokens, `(rows, tokens)`.
    """
    placed = values.new_zeros(mask.shape).masked_scatter(mask, values)
    return placed.sum(dim=1) / mask.sum(dim=1).clamp_min(1)


def added(value: Tensor, term: Tensor, loss: Loss, mask: Tensor) -> Tensor:
    """Add a term with one number per row to the values of a loss.

    A pair gets the mean of the term of its two answers, a token that of its row.

    Args:
        value: What the loss returned: `(examples,)`, `(labelled tokens,)` or `(rows, tokens)`.
        term: `(rows,)` or, for a loss on pairs, `(examples,)`.
        loss: The loss.
        mask: True on labelled tokens of the batch, `(rows, tokens)`.
    """
    if loss.needs.unit == "example":
        return value + (term if len(term) == len(value) else torch.stack(term.chunk(2)).mean(dim=0))
    per_token = term[:, None].expand(mask.shape)  # (rows, tokens)
    return value + (per_token[mask] if value.ndim == 1 else torch.where(mask, per_token, 0.0))
