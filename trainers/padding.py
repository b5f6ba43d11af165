"""Rows of tokens as one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device | None = None, left: bool = True
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of rows, `(rows, columns)` each.

    Args:
        rows: Token ids, of any lengths.
        pad: Fills the shorter rows.
        device: Of the tensors; None: the CPU.
        left: Whether rows are filled before their tokens or behind them.
    """
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = width - len(row)
        before, behind = (gap, 0) if left else (0, gap)
        ids.append([*[pad] * before, *row, *[pad] * behind])
        mask.append([0] * before + [1] * len(row) + [0] * behind)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
