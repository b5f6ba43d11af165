"""Sample efficiency: scores against the number of examples, on a log axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

from steertune.recipes.ablation.statistics.paired import RESAMPLES, Interval, interval


def area_between(examples: Sequence[int], first: ArrayLike, second: ArrayLike) -> Interval:
    """Mean height of the first curve over the second on a log axis (area over the length of the axis).

    Args:
        examples: Numbers of examples, rising.
        first: Scores `(pairs, len(examples))`.
        second: Scores of the other arm, paired with the first.
    """
    log_n = np.log(np.asarray(examples, dtype=float))
    gap = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    if len(examples) == 1:
        return interval(gap[:, 0])
    return interval(np.trapezoid(gap, log_n, axis=1) / (log_n[-1] - log_n[0]))


@dataclass(frozen=True)
class Equivalence:
    """How many examples the baseline needs to reach what an arm reaches with n.

    An end is 0 when the baseline is there with its smallest n already, and infinite when it never gets there within
    the grid: the number is censored on that side.
    """

    estimate: float
    low: float
    high: float
    smallest: int
    largest: int

    def __str__(self) -> str:
        return f"{self._side(self.estimate)} [{self._side(self.low)}, {self._side(self.high)}]"

    def _side(self, n: float) -> str:
        if n == 0:
            return f"<= {self.smallest}"
        return f"> {self.largest}" if np.isinf(n) else f"{n:.0f}" if n >= 10 else f"{n:.1f}"


def n_equivalence(
    examples: Sequence[int], baseline: ArrayLike, reached: ArrayLike, confidence: float = 0.95, seed: int = 0
) -> Equivalence:
    """How many examples the baseline needs to reach a score, by resampling the pairs.

    The baseline's curve is its mean score made monotone (isotonic regression) and interpolated on a log axis.

    Args:
        examples: Numbers of examples, rising.
        baseline: The baseline's scores `(pairs, len(examples))`.
        reached: The arm's score with its n examples, `(pairs,)`, paired with the baseline.
        confidence: Of the percentile interval.
        seed: Of the bootstrap.
    """
    curves, targets = np.asarray(baseline, dtype=float), np.asarray(reached, dtype=float)
    log_n = np.log(np.asarray(examples, dtype=float))
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(targets), size=(RESAMPLES // 10, len(targets)))
    found = np.sort([_crossing(log_n, curves[rows].mean(axis=0), targets[rows].mean()) for rows in draws])
    # order statistics, not interpolated quantiles: some of the values are infinite
    tail = int(len(found) * (1 - confidence) / 2)
    estimate = _crossing(log_n, curves.mean(axis=0), targets.mean())
    return Equivalence(estimate, float(found[tail]), float(found[-1 - tail]), min(examples), max(examples))


def _crossing(log_n: NDArray[np.float64], curve: NDArray[np.float64], target: float) -> float:
    if len(log_n) > 1:
        curve = isotonic_regression(curve).x
    reached = np.nonzero(curve >= target - 1e-12)[0]
    if len(reached) == 0:
        return float("inf")
    i = int(reached[0])
    if i == 0:
        return 0.0 if curve[0] > target + 1e-12 or len(log_n) == 1 else float(np.exp(log_n[0]))
    share = (target - curve[i - 1]) / (curve[i] - curve[i - 1])
    return float(np.exp(log_n[i - 1] + share * (log_n[i] - log_n[i - 1])))
