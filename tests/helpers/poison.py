"""A loss that is not finite."""

from __future__ import annotations

import torch
from tiny_data import values

from steertune.losses import Loss, Needs


class Poison(Loss):
    """Cross-entropy until some call, then a loss, or only a gradient, that is not a number."""

    needs = Needs(pairs=False, unit="token")

    def __init__(self, call: int, where: str) -> None:
        self.left, self.where = call, where
        self.before: dict[str, torch.Tensor] = {}
        self.made = None

    def __call__(self, at, generator=None):
        values_ = -at(1.0).token_logps
        self.left -= 1
        if self.left > 0:
            return values_
        self.before = values(self.made.model)
        if self.where == "loss":
            return values_ * torch.nan
        # finite, and its gradient is 0 * inf
        return values_ + 0 * torch.sqrt(values_ * 0)
