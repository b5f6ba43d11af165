"""Find the strengths at which an adapter has given KLs to the base, so that arms are compared at the same KL."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from scipy.optimize import brentq

_TOLERANCE = 0.02  # relative tolerance of the strength
_REACHED = 0.25  # in log KL: an error too large for the tolerance of the strength is a jump over the target
_CLOSE = 0.03  # in log KL: near enough to stop
_ENOUGH = 0.1  # in log KL: near enough after the last evaluation
_EVALUATIONS = 3  # on all rows, for each target
_STEP = math.log(2.0)
_SMALL = math.log(1 / 16)
_SMALLEST = math.log(1e-6)
_QUADRATIC = 1.9, 2.1  # slope of log KL on log strength for small vectors
_NEAR = 0.5  # in log strength: far more than the error of few rows, but not as far as another crossing
_FALL = 0.05  # in log KL: a smaller fall may be rounding


@dataclass(frozen=True)
class Point:
    """One point of an arm's frontier.

    Attributes:
        target: The KL to reach, in nats per token.
        strength: The strength that reaches it; if none does, the one whose KL comes nearest from below.
        kl: The KL at that strength.
        reached: Whether this KL is the target.
    """

    target: float
    strength: float
    kl: float
    reached: bool


class Curve:
    """KL against strength, computed as the search needs it. KL is in nats per token, and a KL that is not finite
    counts as too large.

    KL is quadratic in a small strength, so the search starts at a small one and walks up, by a factor of two at most
    unless the last two points lie on a parabola. So it finds the smallest strength with a given KL, even where the KL
    falls again beyond it (KL need not grow with the strength).
    """

    def __init__(self, kl: Callable[[float], float], largest: float) -> None:
        self._kl, self._limit = kl, math.log(largest)
        self._logs: dict[float, float] = {}

    def crossing(self, target: float) -> float | None:
        """The smallest strength with this KL; None if no strength up to the largest reaches it."""
        goal = math.log(target)

        def excess(x: float) -> float:
            return self._at(x) - goal

        # down to a strength that is clearly too small, from a measured one or from a small one
        low = min([x for x in self._logs if excess(x) < 0], default=min(_SMALL, self._limit))
        while excess(low) > -_STEP and low > _SMALLEST:
            low = max(_SMALLEST, low - max(_STEP, (excess(low) + 2 * _STEP) / 2))
        if excess(low) > 0:
            return None
        # up, until the KL is too large
        high, before = low, None
        while excess(high) < 0:
            if high >= self._limit:
                return None
            slope = (self._at(high) - self._at(before)) / (high - before) if before is not None else 0.0
            leap = -excess(high) / 2 - _STEP / 2 if _QUADRATIC[0] < slope < _QUADRATIC[1] else _STEP
            above = [x for x in self._logs if x > high]
            before, high = high, min([self._limit, high + max(_STEP, leap), *above])
        if before is None:
            return math.exp(low) if excess(low) == 0 else None
        x = high if excess(high) == 0 else float(brentq(excess, before, high, xtol=_TOLERANCE))  # pyright: ignore[reportArgumentType]
        return math.exp(x) if abs(excess(x)) < _REACHED else None

    def last(self, target: float) -> float | None:
        """The measured strength with the largest KL below this one; None if there is none."""
        below = {x: y for x, y in self._logs.items() if y < math.log(target)}
        return math.exp(max(below, key=lambda x: (below[x], -x))) if below else None

    @property
    def falls(self) -> bool:
        """Whether a larger strength was measured to have a smaller KL."""
        logs = np.array([self._logs[x] for x in sorted(self._logs) if self._logs[x] < _TOO_MUCH])
        return bool(len(logs) and (np.maximum.accumulate(logs) - logs).max() > _FALL)

    def _at(self, x: float) -> float:
        if x not in self._logs:
            value = self._kl(math.exp(x))
            self._logs[x] = math.log(max(value, 1e-12)) if math.isfinite(value) else _TOO_MUCH
        return self._logs[x]


_TOO_MUCH = 50.0  # log KL of a model whose probabilities are not finite


def refined(kl: Callable[[float], float], target: float, guess: float, largest: float) -> Point:
    """The strength near `guess` at which `kl(strength)` is `target`, found in at most three evaluations.

    The secant method in logarithms, for a `kl` that is more expensive than the one that found `guess`. It stops within
    3 % of the target; the last point counts as reached within 10 %.
    """
    x, slope, before = math.log(guess), 2.0, None
    points: list[Point] = []
    for _ in range(_EVALUATIONS):
        value = kl(math.exp(x))
        if not math.isfinite(value) or value <= 0:
            break
        y = math.log(value / target)
        points.append(Point(target, math.exp(x), value, abs(y) < _ENOUGH))
        if abs(y) < _CLOSE:
            break
        if before is not None and before[0] != x:
            slope = min(6.0, max(0.5, (y - before[1]) / (x - before[0])))
        before, x = (x, y), min(math.log(largest), x - y / slope)
    if not points:
        return Point(target, guess, math.nan, False)
    nearest = min(points, key=lambda point: abs(math.log(point.kl / target)))
    below = [point for point in points if point.kl < target]
    return nearest if nearest.reached or not below else max(below, key=lambda point: point.kl)


def nearby(measured: Mapping[float, float], target: float, guess: float) -> Point | None:
    """A strength near `guess` that was measured to have this KL."""
    for strength, kl in measured.items():
        if abs(math.log(strength / guess)) < _NEAR and abs(math.log(max(kl, 1e-12) / target)) < _CLOSE:
            return Point(target, strength, kl, True)
    return None


def frontier(
    few: Callable[[float], float],
    every: Callable[[float], float],
    targets: Sequence[float],
    largest: float,
    measured: Mapping[float, float] = MappingProxyType({}),
) -> tuple[list[Point], bool]:
    """A point for every target, the smallest first; an arm that stops short keeps its last point. `few` measures the
    KL at a strength on a few rows, to find a guess, and `every` on all rows, to decide; `measured` maps strengths to
    their KLs on all rows, measured before.

    Returns:
        The points, and whether the KL was seen to fall while the strength grew.
    """
    curve, ratio, points = Curve(few, largest), 1.0, []
    for target in sorted(targets):
        # few rows are off by about the same factor at every strength
        guess = curve.crossing(target / ratio) or curve.crossing(target)
        if guess is not None:
            point = nearby(measured, target, guess) or refined(every, target, guess, largest)
            if point.reached:
                ratio = min(2.0, max(0.5, point.kl / few(point.strength)))
        else:
            strength = curve.last(target)
            strength = largest if strength is None else strength
            point = Point(target, strength, every(strength), False)
        points.append(point)
    return points, curve.falls
