"""A loss around another: it asks for what that asks for, and more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._base import Loss


@dataclass(frozen=True)
class Wrapped(Loss):
    """A loss that adds to another, or changes what it sees.

    Args:
        loss: The other.
    """

    loss: Loss

    def _need(self, **more: Any) -> None:
        """Need what the other loss needs, with `more` on top."""
        object.__setattr__(self, "needs", replace(self.loss.needs, **more))


def parts(loss: Loss) -> list[Loss]:
    """A loss and, of one around others, those inside; the innermost last."""
    inner = [value for value in vars(loss).values() if isinstance(value, Loss)]
    return [loss, *(part for one in reversed(inner) for part in parts(one))]


def per_row(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the labelled tokens of every row, `(rows,)`.

    Args:
        values: One per labelled token, row after row, `(labelled tokens,)`.
        mask: True on labelled tokens, `(rows, tokens)`.
    """
    placed = values.new_zeros(mask.shape).masked_scatter(mask, values)
    return placed.sum(dim=1) / mask.sum(dim=1).clamp_min(1)


def added(value: Tensor, of_rows: Tensor, loss: Loss, mask: Tensor) -> Tensor:
    """A loss's values plus a term of every row: of both answers of a pair the mean, of a token that of its row.

    Args:
        value: What the loss returned.
        of_rows: The term, `(rows,)` or, for a loss on pairs, `(examples,)`.
        loss: The loss.
        mask: True on labelled tokens of the batch, `(rows, tokens)`.
    """
    if loss.needs.unit == "example":
        return value + (of_rows if len(of_rows) == len(value) else torch.stack(of_rows.chunk(2)).mean(dim=0))
    per_token = of_rows[:, None].expand(mask.shape)
    return value + (per_token[mask] if value.ndim == 1 else torch.where(mask, per_token, 0.0))
