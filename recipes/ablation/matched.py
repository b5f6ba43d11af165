"""The strength at which an adapter changes neutral text by a stated amount: arms are compared at the same KL."""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy.optimize import brentq

_TOLERANCE = 0.02  # relative, of the strength
_REACHED = 0.25  # of log KL: more off than the tolerance of the strength explains is a jump over the target
_STEP = math.log(2.0)
_SMALLEST = math.log(1e-6)


def matched_strength(kl: Callable[[float], float], target: float, largest: float) -> float | None:
    """The strength at which `kl(strength)` is `target`; None if there is none up to `largest`.

    KL grows about with the square of the strength, so the search runs over log-strength from `sqrt(target / kl(1))`.

    Args:
        kl: KL to the base model at a strength, in nats per token; not finite counts as too much.
        target: The KL to reach.
        largest: The largest strength to try.
    """
    limit, seen = math.log(largest), dict[float, float]()

    def excess(log_strength: float) -> float:
        if log_strength not in seen:
            value = kl(math.exp(log_strength))
            seen[log_strength] = math.log(max(value, 1e-12) / target) if math.isfinite(value) else 10.0
        return seen[log_strength]

    start = min(0.0, limit)
    low = high = min(limit, max(_SMALLEST, start - excess(start) / 2))
    # bracket the target, from the guess in the direction that is missing
    while excess(low) > 0:
        if low <= _SMALLEST:
            return None
        high, low = low, max(_SMALLEST, low - _STEP)
    while excess(high) < 0:
        if high >= limit:
            return None
        low, high = high, min(limit, high + _STEP)
    found = low if low == high else float(brentq(excess, low, high, xtol=_TOLERANCE))  # pyright: ignore[reportArgumentType]
    return math.exp(found) if abs(excess(found)) < _REACHED else None
