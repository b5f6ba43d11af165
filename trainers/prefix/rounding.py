"""Whether two ways to compute the same states differ by more than rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def difference(plain: Tensor, ours: Tensor, real: Tensor | None = None) -> float | None:
    """The largest difference over the largest state, or None if that is rounding (the root of the precision's eps).

    Args:
        plain: States, `(rows, tokens, d)`.
        ours: The same, computed in another way.
        real: The tokens to look at, `(rows, tokens)`; None: all.
    """
    if real is not None:
        plain, ours = plain[real], ours[real]
    device = plain.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else plain.dtype
    found = float((plain - ours).abs().max() / plain.abs().max())
    return None if found <= torch.finfo(dtype).eps ** 0.5 else found  # NaN is no rounding either
