"""The strength at which an adapter changes neutral text by a stated amount: arms are compared at the same KL."""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy.optimize import brentq

_TOLERANCE = 0.02  # relative, of the strength
_REACHED = 0.25  # of log KL: more off than the tolerance of the strength explains is a jump over the target
_CLOSE = 0.03  # of log KL, where the search is refined
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


def refined(kl: Callable[[float], float], target: float, guess: float, largest: float) -> float | None:
    """The strength near `guess` at which `kl(strength)` is `target` within 3 %; None if four steps do not find it.

    A secant in logarithms, for a `kl` that is dearer than the one `guess` was found with.

    Args:
        kl: KL to the base model at a strength, in nats per token.
        target: The KL to reach.
        guess: Where to start.
        largest: The largest strength to try.
    """
    x, slope, before = math.log(guess), 2.0, None
    for _ in range(5):
        value = kl(math.exp(x))
        if not math.isfinite(value) or value <= 0:
            return None
        y = math.log(value / target)
        if abs(y) < _CLOSE:
            return math.exp(x)
        if before is not None and before[0] != x:
            slope = min(6.0, max(0.5, (y - before[1]) / (x - before[0])))
        before, x = (x, y), min(math.log(largest), x - y / slope)
    return None
