"""Intervals of means over examples that are independent of each other, as test rows are."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from steertune.recipes.lab.measures import Measure, Missing, Seen

FEW = 30
"""Below this many pairs BCa intervals are too short (for normal differences, 95 % intervals cover 90 % at 10 pairs and
92 % at 20), and Student's t is used."""
RESAMPLES = 9999
ROUNDING = 1e-12


@dataclass(frozen=True)
class Interval:
    """A mean difference and its interval.

    Attributes:
        estimate: Mean over the pairs.
        pairs: How many pairs there were.
        method: `bca`, `percentile`, `t`, `crossed`, `tasks`, or `none` if the pairs are too few or all equal, so that
            their spread is unknown (the ends are then infinite).
        p: P-value of the test that matches a crossed interval or one over tasks: the error level at which the interval
            would just contain zero.
    """

    estimate: float
    low: float
    high: float
    pairs: int
    method: str
    p: float = 1.0

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def within(self, limits: tuple[float, float]) -> Interval:
        """The interval clipped to limits that the mean cannot exceed; unknown ends stay unknown."""
        if np.isinf([self.low, self.high]).any():
            return self
        low, high = np.clip([self.low, self.high], *limits).tolist()
        return replace(self, low=low, high=high)

    @property
    def ends(self) -> str:
        """`[low, high]` as text."""
        return "unknown" if np.isinf([self.low, self.high]).any() else f"[{self.low:+.3f}, {self.high:+.3f}]"

    def __str__(self) -> str:
        return f"{self.estimate:+.3f} {self.ends}"


def interval(differences: ArrayLike, confidence: float = 0.95, method: str | None = None, seed: int = 0) -> Interval:
    """Interval of the mean of differences that are independent of each other, such as test rows; pairs of
    task and seed are not (`seeds_interval`).

    BCa bootstrap (Efron 1987, by scipy) over the pairs; Student's t below `FEW` pairs, where a bootstrap interval is
    too short.

    Args:
        differences: One difference per pair.
        confidence: Share of such intervals that should contain the true mean.
        method: `bca` or `t`, to use it for any number of pairs.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: there are no differences, or one is not finite; `method` or `confidence` is not allowed.
    """
    if method not in (None, "bca", "t") or not 0 < confidence < 1:
        raise ValueError(
            f"method={method!r} must be 'bca' or 't', and confidence={confidence} must be between 0 and 1."
        )
    values = finite(differences)
    mean, pairs = float(values.mean()), len(values)
    if pairs < 2:
        return Interval(mean, -np.inf, np.inf, pairs, "none")
    method = method or ("bca" if pairs >= FEW else "t")
    if np.ptp(values) <= ROUNDING * max(1.0, abs(mean)):
        # if all are equal, zeros show no difference; others may be equal by chance, so the ends are unknown
        if abs(mean) <= ROUNDING:
            return Interval(0.0, 0.0, 0.0, pairs, method)
        return Interval(mean, -np.inf, np.inf, pairs, "none")
    if method == "t":
        low, high = stats.t.interval(confidence, pairs - 1, loc=mean, scale=stats.sem(values))
    else:
        with warnings.catch_warnings():  # a degenerate resample
            warnings.simplefilter("ignore")
            bootstrap = stats.bootstrap(
                (values,), np.mean, confidence_level=confidence, n_resamples=RESAMPLES, method="BCa", rng=seed
            )
        low, high = bootstrap.confidence_interval
    return Interval(mean, float(low), float(high), pairs, method)


def share_interval(events: Sequence[bool], method: str = "exact") -> Interval:
    """How often an event occurs, with its 95 % interval: Clopper and Pearson's (`exact`), or Wilson's (`wilson`)."""
    ends: Any = stats.binomtest(sum(events), len(events)).proportion_ci(method=method)
    return Interval(sum(events) / len(events), float(ends.low), float(ends.high), len(events), method)


def rate(events: Sequence[bool]) -> str:
    """`share_interval` as text; empty without events."""
    if not events:
        return ""
    share = share_interval(events)
    return f"{share.estimate:.0%} [{share.low:.0%}, {share.high:.0%}]"


def finite(differences: ArrayLike) -> NDArray[np.float64]:
    """The differences as an array.

    Raises:
        ValueError: there are no differences, or one is not finite.
    """
    values = np.asarray(differences, dtype=float)
    if values.size == 0 or not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"Got {values.size} differences, {bad} of them not finite. Pass at least one, all finite.")
    return values


def of_measure(measure: Measure, seen: Seen) -> Interval | None:
    """A measure's mean over the examples of one model, with its 95 % interval for other examples.

    Values of 0 and 1 get Wilson's interval, which allows for the values between them that other examples of a bounded
    measure may have. A weighted mean, such as that of a KL per token, is a ratio of two means; its interval is that of
    `mean + weight * (value - mean) / mean weight`, whose mean and spread are those of the ratio to first order
    (Cochran 1977, section 6.3). For a perplexity, the mean and the ends are exponentiated.

    Returns:
        None if the model was not measured.
    """
    try:
        values, mean = measure.values(seen), measure.summary(seen)
    except Missing:
        return None
    valid = np.isfinite(values)
    if np.isnan(mean) or not valid.any():
        return None
    values = values[valid]
    if set(values) <= {0.0, 1.0} and measure.total is None and not measure.weight:
        return share_interval(values.astype(bool).tolist(), "wilson")
    weights = np.ones_like(values)
    if measure.weight in seen.observations and measure.name not in seen.observations:
        weights = seen[measure.weight][valid]
    centre = float(np.average(values, weights=weights))
    around = interval(centre + weights * (values - centre) / weights.mean()).within(measure.limits)
    if (values >= 0).all():
        # the mean of non-negative values is not below 0, that of shares not above 1
        around = around.within((0.0, 1.0 if measure.shares and (values <= 1).all() else np.inf))
    low, high = around.low, around.high
    if measure.total is not None:
        low, high = (float(measure.total(end)) if np.isfinite(end) else end for end in (low, high))
    return Interval(mean, low, high, len(values), around.method)
