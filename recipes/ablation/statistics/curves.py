"""Sample efficiency: scores against the number of examples, on a log axis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.statistics.paired import Difference, crossed, difference, judged, over_seeds_and_rows
from steertune.recipes.lab.intervals import Interval

_POINTS = 60  # at which a curve is compared, for the interval of the number of examples


def area_between(first: Frame, second: Frame, sample: bool = False) -> Difference:
    """Mean height of the first curve over the second on a log axis (area over the length of the axis). Both have
    scores by task and seed, a column per number of examples (rising), each an array over the test rows."""
    log_n = np.log(np.asarray(first.columns, dtype=float))
    if len(log_n) == 1:
        return difference((first - second).iloc[:, 0], sample)
    widths = np.diff(log_n)
    weights = (np.append(widths, 0.0) + np.append(0.0, widths)) / 2 / widths.sum()  # of the trapezoidal rule
    return difference(sum((first[n] - second[n]) * w for n, w in zip(first.columns, weights, strict=True)), sample)


@dataclass(frozen=True)
class Equivalence:
    """How many examples the baseline needs to reach what an arm reaches with n.

    An end is 0 if the baseline already reaches it with its smallest n, and infinite if it never does within the grid:
    the number is censored on that side.
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


def n_equivalence(baseline: Frame, reached: Frame) -> Equivalence:
    """How many examples the baseline needs to reach a score.

    The estimate is where the baseline's mean curve, made monotone (isotonic regression) and interpolated on a log
    axis, reaches the arm's mean. As in Fieller's method, the interval contains every number of examples at which the
    interval (95 %, for other seeds and test rows) of the difference between arm and interpolated baseline contains
    zero.

    Args:
        baseline: The baseline's scores by task and seed, a column per number of examples (rising), each an array over
            the test rows.
        reached: The arm's scores with its n examples, of the same pairs.
    """
    examples = [int(n) for n in baseline.columns]
    log_n = np.log(np.asarray(examples, dtype=float))
    curve = np.array([baseline[n].map(np.nanmean).mean() for n in examples])
    estimate = _crossing(log_n, curve, float(reached.map(np.nanmean).mean()))
    axis = np.union1d(np.linspace(log_n[0], log_n[-1], _POINTS), log_n)
    gaps = _gaps(baseline, reached, log_n, axis)
    not_short = np.nonzero(np.array([gap.low <= 0 for gap in gaps]))[0]  # the baseline is not clearly short of it
    not_beyond = np.nonzero(np.array([gap.high >= 0 for gap in gaps]))[0]
    low = np.inf if not len(not_short) else 0.0 if not_short[0] == 0 else float(np.exp(axis[not_short[0]]))
    last = len(axis) - 1
    high = 0.0 if not len(not_beyond) else np.inf if not_beyond[-1] == last else float(np.exp(axis[not_beyond[-1]]))
    return Equivalence(estimate, min(low, estimate), max(high, estimate), examples[0], examples[-1])


def _gaps(baseline: Frame, reached: Frame, log_n: NDArray[np.float64], axis: NDArray[np.float64]) -> list[Interval]:
    """How far the arm is ahead of the baseline with `exp(x)` examples, for every x of the axis; between two numbers of
    examples, each pair of task and seed is interpolated separately."""
    if len(log_n) == 1:
        return [crossed(reached - baseline.iloc[:, 0])] * len(axis)
    gaps, starts = [], np.clip(np.searchsorted(log_n, axis) - 1, 0, len(log_n) - 2)
    for i in np.unique(starts):
        # complex: the gap at the segment's start and at its end, of the test rows that were judged at both
        ends = judged((reached - baseline.iloc[:, i]) + 1j * (reached - baseline.iloc[:, i + 1]))
        for share in (axis[starts == i] - log_n[i]) / (log_n[i + 1] - log_n[i]):
            gaps.append(over_seeds_and_rows([(1 - share) * task.real + share * task.imag for task in ends]))
    return gaps


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
