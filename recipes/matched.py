"""The strength at which an adapter changes neutral text by a stated amount: arms are compared at the same KL."""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy.optimize import brentq

_TOLERANCE = 0.02  # relative, of the strength
_STEP = math.log(2.0)


def matched_strength(kl: Callable[[float], float], target: float, largest: float) -> float | None:
    """The strength at which `kl(strength)` is `target`; None if that takes more than `largest`, or there is none.

    KL grows about with the square of the strength, so the search runs over log-strength from `sqrt(target / kl(1))`.

    Args:
        kl: KL to the base model at a strength, in nats per token; not finite counts as too much.
        target: The KL to reach.
        largest: The largest strength to try.
    """
    seen: dict[float, float] = {}

    def excess(log_strength: float) -> float:
        if log_strength not in seen:
            value = kl(math.exp(log_strength))
            seen[log_strength] = math.log(max(value, 1e-12) / target) if math.isfinite(value) else 10.0
        return seen[log_strength]

    limit = math.log(largest)
    low = high = min(limit, max(-limit, -excess(0.0) / 2))
    # bracket the target, from the guess in the direction that is missing
    while excess(low) > 0:
        high, low = low, low - _STEP
        if low < -limit - _STEP:
            return None
    while excess(high) < 0:
        if high >= limit:
            return None
        low, high = high, min(limit, high + _STEP)
    if low == high:
        return math.exp(low)
    return math.exp(float(brentq(excess, low, high, xtol=_TOLERANCE)))  # pyright: ignore[reportArgumentType]
