"""Cross-entropy of the labelled tokens: supervised finetuning. For pairs, only the chosen answers are used.

`-log π(y_t | x, y_<t)`, averaged over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._base import At, Loss, Needs


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Negative log-likelihood per token."""

    needs = Needs(pairs=False, unit="token")

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """`(rows, tokens)`, 0 at tokens without a label."""
        return -at(1.0).token_logps
