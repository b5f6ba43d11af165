"""Constraints on the length of the vector (the `norm` switch)."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import Norm

_TINY = 1e-12


def write_vector(
    norm: Norm, v: Tensor, value: float | None, residual_norm: float | None, length: Tensor | None = None
) -> Tensor:
    """The vector that is written: `v`, or `v` rescaled to the length of `fixed`, `relative` or `learned`.

    Args:
        norm: The rule.
        v: The trained vector(s), `(d,)` or `(rank, d)`.
        value: `norm_value`: the length (`fixed`), or the share of the mean residual norm (`relative`).
        residual_norm: Mean norm of the residual stream at this layer (`relative` only).
        length: The trained length, `(1,)`, of either sign (`learned` only).
    """
    if norm not in ("fixed", "relative", "learned"):
        return v
    if norm != "learned":
        assert value is not None
        length = v.new_tensor(value if norm == "fixed" else value * (residual_norm or 0.0))
    assert length is not None
    return v * (length / torch.linalg.vector_norm(v).clamp_min(_TINY))


def cap(change: Tensor, limit: float) -> Tensor:
    """Shorten every change longer than `limit` to `limit`: `c · min(1, limit / |c|)`."""
    length = torch.linalg.vector_norm(change, dim=-1, keepdim=True).clamp_min(_TINY)
    return change * (limit / length).clamp_max(1.0)


def preserve(steered: Tensor, hidden: Tensor) -> Tensor:
    """Rescale each steered state to its old norm: `h' · |h| / |h'|` (ICV, Liu et al. 2311.06668, section 3)."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    old, new = (torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=exact) for states in (hidden, steered))
    return steered * (old / new.clamp_min(_TINY))
