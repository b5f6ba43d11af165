"""Intervals and tests for differences between arms that saw the same data.

Differences are taken within a pair (same task, same seed, same examples), so what the pair has in common cancels.
Three things could have been different: the seeds, the test rows, and the tasks. There is an interval for each. Each
allows for everything that the one before it allows for, so it is never narrower:

1. `seeds_interval`: other seeds, on these test rows of these tasks.
2. `crossed_interval`: other seeds and other test rows, of these tasks. All seeds of a task are measured on the same
   rows, so the pairs of a task are not independent looks at it.
3. `tasks_interval`: other seeds, test rows and tasks, as if the tasks had been drawn from many like them. This is the
   interval that is read first, and that of a claim about tasks like these; a claim about these tasks alone goes by 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.lab.intervals import RESAMPLES, ROUNDING, Interval, finite

_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Difference:
    """A mean difference over pairs, with its intervals and tests.

    Attributes:
        interval: For other seeds, on these test rows of these tasks.
        crossed: For other seeds and test rows of these tasks.
        tasks: For other seeds, test rows and tasks.
        permutation: p of the permutation test over the pairs.
        p: Of the test over tasks where they are a sample; else the larger of the permutation test's and of the crossed
            interval's. Corrected where several differences were looked at.
        sample: Whether tasks are treated as a sample, so that `tasks` is the interval that counts.
    """

    interval: Interval
    crossed: Interval
    tasks: Interval
    permutation: float
    p: float
    sample: bool = False

    @property
    def shown(self) -> Interval:
        """The interval that counts."""
        return self.tasks if self.sample else self.crossed

    @property
    def estimate(self) -> float:
        """The mean difference."""
        return self.interval.estimate

    def clear(self, alpha: float = 0.05) -> bool:
        """Whether it can be claimed: for other tasks, or for other seeds and test rows and by the permutation test."""
        return self.p < alpha

    def __str__(self) -> str:
        ends = self.shown.ends
        return f"{self.estimate:+.3f} {ends if ends.startswith('[') else f'[{ends}]'}"


@dataclass(frozen=True)
class _Spread:
    """Variance of the mean over all pairs, and the degrees of freedom of its estimate."""

    variance: float
    freedom: float


def seeds_interval(*tasks: ArrayLike, confidence: float = 0.95) -> Interval:
    """Interval over seeds: would it hold for other seeds, on these test rows of these tasks?

    The tasks are fixed, so differences between them do not make the interval wider: only seeds of the same task show
    how much seeds vary. Student's t with Satterthwaite's degrees of freedom, since the seeds of one task may vary more
    than those of another; for one task that is the plain t interval.

    What holds for other test rows, or other tasks, holds for these too. So if one of those intervals is shorter, it is
    used: test rows have many degrees of freedom where seeds are few, or all seeds may happen to agree. If a task has
    only one seed, nothing shows how much seeds vary, and there is no interval.
    """
    matrices = _matrices(tasks)
    if any(len(values) < 2 for values in matrices):
        return _students(matrices, None, confidence, "t")
    intervals = [
        _students(matrices, _within(matrices, axis=0), confidence, "t"),
        crossed_interval(*tasks, confidence=confidence),
        tasks_interval(*tasks, confidence=confidence),
    ]
    shortest = min(intervals, key=lambda one: one.high - one.low)
    return replace(shortest, method="none" if shortest.method == "none" else "t", p=1.0)


def crossed_interval(*tasks: ArrayLike, confidence: float = 0.95) -> Interval:
    """Interval over seeds and test rows at once: would it hold for other seeds and other test rows?

    All seeds are measured on the same test rows, so an interval over seeds alone is about these rows only. In a
    crossed design the variance of the mean is at most `var(seed means) / seeds + var(row means) / rows`, which counts
    the residual twice and so errs on the safe side (Owen 2007); Student's t with Satterthwaite's degrees of freedom.
    """
    matrices = _matrices(tasks)
    return _students(matrices, _over_seeds_and_rows(matrices), confidence, "crossed")


def tasks_interval(*tasks: ArrayLike, confidence: float = 0.95) -> Interval:
    """Interval over tasks, with their seeds and test rows: would it hold for other tasks like these?

    Student's t over the means of the tasks, with one degree of freedom less than there are tasks. Task means differ
    by their seeds and rows too, so the variance cannot be less than that of `crossed_interval`; where the means are
    closer than that by chance, the tasks themselves are assumed to add nothing.
    """
    matrices = _matrices(tasks)
    between, within = _over_tasks(matrices), _over_seeds_and_rows(matrices)
    if between is not None and within is not None:
        between = _Spread(max(between.variance, within.variance), min(between.freedom, within.freedom))
    return _students(matrices, between, confidence, "tasks")


def _matrices(tasks: Sequence[ArrayLike]) -> list[NDArray[np.float64]]:
    return [np.asarray(task, dtype=float) for task in tasks]


def _weights(tasks: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The share of every task in the mean over all pairs."""
    seeds = np.array([len(values) for values in tasks], dtype=float)
    return seeds / seeds.sum()


def _over_seeds_and_rows(tasks: Sequence[NDArray[np.float64]]) -> _Spread | None:
    seeds, rows = _within(tasks, axis=0), _within(tasks, axis=1)
    if seeds is None or rows is None:
        return None
    both = _summed([seeds, rows])
    # at most the seeds' own: two seeds that are close by chance must not hide how few they are
    return _Spread(both.variance, min(both.freedom, sum(len(values) - 1 for values in tasks)))


def _over_tasks(tasks: Sequence[NDArray[np.float64]]) -> _Spread | None:
    """How much the mean varies with the tasks: `var(task means) / tasks` where all have as many pairs."""
    count = len(tasks)
    if count < 2:
        return None
    weights, means = _weights(tasks), np.array([values.mean() for values in tasks])
    squares = (weights * (means - weights @ means)) ** 2
    return _Spread(count / (count - 1) * float(squares.sum()), count - 1)


def _within(tasks: Sequence[NDArray[np.float64]], axis: int) -> _Spread | None:
    """What the seeds (axis 0) or the test rows (axis 1) of each task add to the variance of the mean; None where a
    task has only one of them, which does not show how much they vary."""
    parts = []
    for weight, values in zip(_weights(tasks), tasks, strict=True):
        means = values.mean(axis=1 - axis)
        if len(means) < 2:
            return None
        parts.append(_Spread(float(weight**2 * means.var(ddof=1)) / len(means), len(means) - 1))
    return _summed(parts)


def _summed(parts: Sequence[_Spread]) -> _Spread:
    """Independent parts as one, with Satterthwaite's degrees of freedom."""
    variance = sum(part.variance for part in parts)
    squares = sum(part.variance**2 / part.freedom for part in parts)
    return _Spread(variance, variance**2 / squares if squares > 0 else sum(part.freedom for part in parts))


def _students(
    tasks: Sequence[NDArray[np.float64]], spread: _Spread | None, confidence: float, method: str
) -> Interval:
    """Student's t interval of the mean over all pairs, with p of the test that the mean is zero."""
    means = np.concatenate([values.mean(axis=1) for values in tasks])
    estimate, largest = float(means.mean()), float(np.abs(means).max())
    if spread is None:
        return Interval(estimate, -np.inf, np.inf, len(means), "none")
    if spread.variance <= (ROUNDING * max(1.0, largest)) ** 2:
        if largest <= ROUNDING:  # all differences are zero
            return Interval(0.0, 0.0, 0.0, len(means), method)
        return Interval(estimate, -np.inf, np.inf, len(means), "none")  # the same for all seeds may be chance
    error = spread.variance**0.5
    reach = float(stats.t.ppf((1 + confidence) / 2, spread.freedom)) * error
    p = 2 * float(stats.t.sf(abs(estimate) / error, spread.freedom))
    return Interval(estimate, estimate - reach, estimate + reach, len(means), method, p)


def judged(gap: Frame) -> list[NDArray[np.float64]]:
    """The differences of every task by seed and test row, for the rows that could be judged (are not NaN) in all
    seeds. A pair without any row that could be judged is left out first."""
    kept = gap[gap.map(lambda rows: bool(np.isfinite(rows).any()))]
    tasks = [np.stack([*values]) for _, values in kept.groupby(level="task")]
    whole = [values[:, np.isfinite(values).all(axis=0)] for values in tasks]
    return [values for values in whole if values.size]


def crossed(gap: Frame) -> Interval:
    """`crossed_interval` of differences by task and seed, each an array over the task's test rows."""
    return over_seeds_and_rows(judged(gap))


def over_seeds_and_rows(tasks: Sequence[ArrayLike]) -> Interval:
    """`crossed_interval`; an infinite interval if there is nothing to compare."""
    return crossed_interval(*tasks) if tasks else _NOTHING


def difference(gap: Frame, sample: bool = False) -> Difference:
    """Intervals and tests of differences by task and seed, each an array over the task's test rows (see `judged`);
    with `sample`, tasks stand for others like them."""
    tasks = judged(gap)
    if not tasks:
        return Difference(_NOTHING, _NOTHING, _NOTHING, 1.0, 1.0, sample)
    permutation = p_value(np.concatenate([values.mean(axis=1) for values in tasks]))
    over_rows, over_tasks = crossed_interval(*tasks), tasks_interval(*tasks)
    p = over_tasks.p if sample else max(permutation, over_rows.p)
    return Difference(seeds_interval(*tasks), over_rows, over_tasks, permutation, p, sample)


_NOTHING = Interval(np.nan, -np.inf, np.inf, 0, "none")


def together(differences: Mapping[_Key, Difference]) -> dict[_Key, Difference]:
    """The same differences, with p values corrected (Holm) for looking at all of them."""
    p_values = corrected([one.p for one in differences.values()])
    return {key: replace(one, p=p) for (key, one), p in zip(differences.items(), p_values, strict=True)}


def p_value(differences: ArrayLike, seed: int = 0) -> float:
    """Two-sided permutation test that the arms of every pair could be swapped: exact for up to 13 pairs.

    Its smallest value is `smallest_p`.

    Raises:
        ValueError: no difference is given, or one is not finite.
    """
    values = finite(differences)
    if len(values) < 2 or not values.any():
        return 1.0
    zeros = np.zeros_like(values)

    def mean(first: NDArray[np.float64], second: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        # rounded: permutations that are equal on paper must count as equal
        return np.round(np.mean(first - second, axis=axis), 12)

    test = stats.permutation_test(
        (values, zeros), mean, permutation_type="samples", n_resamples=RESAMPLES, vectorized=True, rng=seed
    )
    return float(test.pvalue)


def smallest_p(pairs: int) -> float:
    """The smallest p that the permutation test over this many pairs can give."""
    return 2.0 / 2**pairs


def least_p(differences: Sequence[Difference]) -> float:
    """The smallest corrected p that differences looked at together can have: what their pairs allow, by Holm."""
    if not differences:
        return 1.0
    if any(one.sample and one.tasks.method != "none" for one in differences):
        return 0.0  # Student's t has no smallest p
    return min(1.0, len(differences) * smallest_p(max(one.interval.pairs for one in differences)))


def too_few(differences: Sequence[Difference], alpha: float = 0.05) -> str:
    """A sentence if there are too few pairs for anything in a table to be clear; else an empty string."""
    least = least_p(differences)
    if not differences or least < alpha:
        return ""
    if any(one.sample for one in differences):
        return "Nothing here can be clear: tasks are a sample, and there are too few to see how they vary."
    pairs = max(one.interval.pairs for one in differences)
    what = f"{len(differences)} comparison{'s' * (len(differences) > 1)} of {pairs} pair{'s' * (pairs > 1)}"
    return f"Nothing here can be clear: p of {what} cannot be below {least:.2g}."


def corrected(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for looking at all of these."""
    if not len(p_values):
        return []
    adjusted: Any = multipletests(list(p_values), method="holm")[1]
    return [float(p) for p in adjusted]
