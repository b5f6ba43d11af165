"""How well scores tell bad rows from innocent ones, with intervals: ranking, recall, calibration, drift.

Shapes: P bad rows, N innocent rows, R bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats
from sklearn.metrics import roc_auc_score

from steertune.adapters.analysis.probing import calibration_error
from steertune.recipes.lab.intervals import Interval, share_interval

_CONFIDENCE = 0.95
_RESAMPLES = 4000


@dataclass(frozen=True)
class Detection:
    """How well a detector does on rows that it was not fitted on.

    Attributes:
        auroc: Area under the ROC curve.
        recall: Share of the bad rows that its threshold flags.
        false_positives: Share of the innocent rows that its threshold flags.
        brier: Mean squared error of its probability; NaN if it has none.
        calibration_error: Mean gap between probability and frequency over ten bins, weighted by their rows.
    """

    auroc: Interval
    recall: Interval
    false_positives: Interval
    brier: float
    calibration_error: float


def detection(
    scores: Sequence[float], bad: Sequence[bool], threshold: float, probability: Callable[[float], float] | None
) -> Detection:
    """Measure a detector on held-out rows, of which some are bad and some are not.

    Args:
        scores: The score of every row.
        bad: Whether each row is bad.
        threshold: Rows with a higher score are flagged.
        probability: Maps a score to the probability that the row is bad; None if the detector gives none.
    """
    values, truth = np.asarray(scores, dtype=float), np.asarray(bad, dtype=bool)
    flagged = values > threshold
    chances = np.full(len(values), np.nan) if probability is None else np.array([probability(s) for s in values])
    return Detection(
        auroc=auroc(values, truth),
        recall=share(flagged[truth]),
        false_positives=share(flagged[~truth]),
        brier=float(np.mean((chances - truth) ** 2)),
        calibration_error=float("nan") if np.isnan(chances).any() else calibration_error(chances, truth),
    )


def share(hits: ArrayLike) -> Interval:
    """A share with Wilson's interval; without rows, its ends are infinite."""
    events: list[bool] = np.asarray(hits, dtype=bool).tolist()
    return share_interval(events, "wilson") if events else Interval(float("nan"), -np.inf, np.inf, 0, "none")


def auroc(scores: ArrayLike, bad: ArrayLike) -> Interval:
    """Area under the ROC curve, with an interval that also works at 1 (Newcombe 2006, method 5).

    Its ends are the areas θ whose distance from the estimate is z standard errors *at θ*, with the variance of
    Hanley and McNeil (1982):

        θ (1 - θ) (1 + (M/2 - 1) (1 - θ) / (2 - θ) + (M/2 - 1) θ / (1 + θ)) / (P N),   M = P + N
    """
    values, truth = np.asarray(scores, dtype=float), np.asarray(bad, dtype=bool)
    P, N = int(truth.sum()), int((~truth).sum())
    if not P or not N:
        return Interval(float("nan"), -np.inf, np.inf, P + N, "none")
    area = float(roc_auc_score(truth, values))
    z, half = float(stats.norm.ppf(0.5 + _CONFIDENCE / 2)), (P + N) / 2 - 1

    def distance(theta: float) -> float:
        spread = 1 + half * (1 - theta) / (2 - theta) + half * theta / (1 + theta)
        return abs(area - theta) - z * (theta * (1 - theta) * spread / (P * N)) ** 0.5

    tiny = 1e-9
    inside = min(max(area, tiny), 1 - tiny)  # where the distance is below 0
    root: Any = optimize.brentq
    low = root(distance, tiny, inside) if distance(tiny) > 0 else 0.0
    high = root(distance, inside, 1 - tiny) if distance(1 - tiny) > 0 else 1.0
    return Interval(area, low, high, P + N, "newcombe")


def auroc_difference(first: ArrayLike, second: ArrayLike, bad: ArrayLike, seed: int = 0) -> Interval:
    """The area of the first detector minus that of the second, on the same rows.

    Percentile bootstrap; bad and innocent rows are resampled separately.
    """
    truth = np.asarray(bad, dtype=bool)
    gap_PN = _wins(np.asarray(first, dtype=float), truth) - _wins(np.asarray(second, dtype=float), truth)
    P, N = gap_PN.shape
    if P < 2 or N < 2:
        return Interval(float(gap_PN.mean()) if gap_PN.size else float("nan"), -np.inf, np.inf, P + N, "none")
    draw = np.random.default_rng(seed)
    counts_RP = draw.multinomial(P, np.full(P, 1 / P), size=_RESAMPLES) / P
    counts_RN = draw.multinomial(N, np.full(N, 1 / N), size=_RESAMPLES) / N
    means_R = ((counts_RP @ gap_PN) * counts_RN).sum(axis=1)
    low, high = np.quantile(means_R, [0.5 - _CONFIDENCE / 2, 0.5 + _CONFIDENCE / 2])
    return Interval(float(gap_PN.mean()), float(low), float(high), P + N, "bootstrap")


def _wins(scores: NDArray[np.float64], bad: NDArray[np.bool_]) -> NDArray[np.float64]:
    """1 where a bad row has the higher score than an innocent one, 1/2 for a tie, `(P, N)`."""
    return (np.sign(scores[bad][:, None] - scores[~bad][None, :]) + 1) / 2


@dataclass(frozen=True)
class Drift:
    """How the scores of two samples of traffic differ.

    Attributes:
        distance: Largest gap between their distribution functions (Kolmogorov and Smirnov).
        p: Probability of a gap at least as large if both came from the same traffic.
        shift: Change of the mean score, in standard deviations of the first sample.
        flagged: Share of each that the threshold flags.
    """

    distance: float
    p: float
    shift: float
    flagged: tuple[Interval, Interval]


def drift(first: Sequence[float], second: Sequence[float], threshold: float) -> Drift:
    """Compare the scores of an earlier and of a later sample of traffic.

    Raises:
        ValueError: a sample has fewer than 2 rows.
    """
    before, after = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if min(len(before), len(after)) < 2:
        raise ValueError(f"Drift compares two samples of 2 rows or more (got {len(before)} and {len(after)}).")
    test: Any = stats.ks_2samp(before, after)
    spread = float(before.std(ddof=1)) or 1.0
    shift = float(after.mean() - before.mean()) / spread
    flagged = share(before > threshold), share(after > threshold)
    return Drift(float(test.statistic), float(test.pvalue), shift, flagged)
