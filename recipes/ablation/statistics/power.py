"""Which difference between two arms a design can detect, before it runs.

A difference in task t, seed s and test row r is `δ + task + seed + row + rest`, each part independent of the others:
`task` varies from task to task, `seed` from seed to seed of a task, `row` from test row to test row of a task, and
`rest` is what is left. The mean over T tasks, S seeds and R rows then has the variance

    (task + seed / S + row / R + rest / (S R)) / T      where tasks are a sample
    (seed / S + row / R + rest / (S R)) / T             where they are fixed

and the tests are those of `paired`: Student's t over tasks, or the crossed one together with the permutation test.
Power is that of the noncentral t distribution, with the variances in place of their estimates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.statistics.paired import judged, smallest_p

POWER = 0.8


@dataclass(frozen=True)
class Components:
    """Variances of the difference between two arms (see above)."""

    task: float
    seed: float
    row: float
    rest: float

    def __str__(self) -> str:
        parts = {"task": self.task, "seed": self.seed, "row": self.row, "rest": self.rest}
        return ", ".join(f"{name} {math.sqrt(value):.3f}" for name, value in parts.items())


MEASURED: Mapping[str, Components] = {
    "accuracy": Components(task=0.0055, seed=0.0010, row=0.0389, rest=0.0630),
    "behaviour": Components(task=0.0049, seed=0.0010, row=0.0046, rest=0.0253),
}
"""Means over the studies of docs/results, at matched KL, of the components between all pairs of arms of a study."""


@dataclass(frozen=True)
class Design:
    """How many tasks, seeds of a task, and test rows of a task."""

    tasks: int
    seeds: int
    rows: int


@dataclass(frozen=True)
class _Test:
    """Student's t of a mean: its true standard error, the one that the test uses, and the degrees of freedom."""

    true: float
    taken: float
    freedom: float

    def power(self, difference: float, alpha: float) -> float:
        """Probability that the test is significant, for a true difference."""
        if self.freedom <= 0:
            return 0.0
        limit = float(stats.t.ppf(1 - alpha / 2, self.freedom)) * self.taken / self.true
        shift = difference / self.true
        tails = float(stats.nct.sf(limit, self.freedom, shift) + stats.nct.cdf(-limit, self.freedom, shift))
        return 1.0 if math.isnan(tails) else tails  # scipy's tail where the difference is far beyond the limit


def power(parts: Components, design: Design, difference: float, sample: bool, alpha: float = 0.05) -> float:
    """Probability that a two-sided test at `alpha` calls a true mean difference clear; with `sample`, the difference
    is the mean over other tasks too."""
    if not sample and smallest_p(design.tasks * design.seeds) >= alpha:
        return 0.0  # the permutation test cannot reach alpha
    return min(test.power(difference, alpha) for test in _tests(parts, design, sample))


def detectable(parts: Components, design: Design, sample: bool, alpha: float = 0.05, reach: float = POWER) -> float:
    """The smallest true difference that is called clear with probability `reach`; infinite if there is none."""

    def excess(difference: float) -> float:
        return power(parts, design, difference, sample, alpha) - reach

    high, largest = 1e-6, 1e6
    while excess(high) < 0:
        if high > largest:
            return math.inf
        high *= 2
    return float(brentq(excess, high / 2, high)) if excess(high / 2) < 0 else 0.0  # pyright: ignore[reportArgumentType]


def _tests(parts: Components, design: Design, sample: bool) -> list[_Test]:
    tasks, seeds, rows = design.tasks, design.seeds, design.rows
    # variances of a task's mean over its seeds and over its rows; both count the rest, as the crossed interval does
    over_seeds, over_rows = (parts.seed + parts.rest / rows) / seeds, (parts.row + parts.rest / seeds) / rows
    within = (parts.seed / seeds + parts.row / rows + parts.rest / (seeds * rows)) / tasks
    within = max(within, 1e-12)
    freedom = 0.0
    if min(seeds, rows) > 1:
        squares = over_seeds**2 / (seeds - 1) + over_rows**2 / (rows - 1)
        freedom = min(tasks * (over_seeds + over_rows) ** 2 / max(squares, 1e-300), tasks * (seeds - 1.0))
    crossed = _Test(math.sqrt(within), math.sqrt(max(over_seeds + over_rows, 1e-12) / tasks), freedom)
    if sample:
        between = math.sqrt(within + parts.task / tasks)
        taken = max(between, crossed.taken) if freedom else between
        return [_Test(between, taken, min(tasks - 1.0, freedom or math.inf))]
    # the permutation test treats every pair of task and seed as one observation
    pairs = tasks * seeds
    spread = within + parts.task * (tasks - 1) * seeds / (pairs - 1) / pairs
    return [crossed, _Test(math.sqrt(within), math.sqrt(spread), pairs - 1.0)]


def components(gaps: Sequence[Frame]) -> Components | None:
    """Variances of differences, by the method of moments, as means over several pairs of arms.

    Returns:
        The variances; None where no pair of arms has two tasks with two seeds and two rows.
    """
    parts = [moments for gap in gaps if (moments := _moments(gap)) is not None]
    if not parts:
        return None
    return Components(*(max(0.0, float(value)) for value in np.mean(parts, axis=0)))


def _moments(gap: Frame) -> tuple[float, float, float, float] | None:
    """Unbiased estimates, which may be negative."""
    tasks = [matrix for matrix in judged(gap) if min(matrix.shape) > 1]
    if len(tasks) < 2:
        return None
    within, means = [], []
    for matrix in tasks:
        seeds, rows = matrix.shape
        by_seed, by_row, mean = matrix.mean(axis=1), matrix.mean(axis=0), matrix.mean()
        left = matrix - by_seed[:, None] - by_row[None] + mean
        rest = float((left**2).sum()) / ((seeds - 1) * (rows - 1))
        seed, row = by_seed.var(ddof=1) - rest / rows, by_row.var(ddof=1) - rest / seeds
        within.append((seed, row, rest, seed / seeds + row / rows + rest / (seeds * rows)))
        means.append(mean)
    seed, row, rest, of_mean = np.mean(within, axis=0)
    return float(np.var(means, ddof=1) - of_mean), seed, row, rest


def larger(design: Design) -> dict[str, Design]:
    """Designs with something added: tasks and rows before seeds, which help least."""
    return {
        "one more task": replace(design, tasks=design.tasks + 1),
        "twice the rows": replace(design, rows=2 * design.rows),
        "one more seed": replace(design, seeds=design.seeds + 1),
    }
