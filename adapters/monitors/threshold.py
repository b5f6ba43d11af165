"""Choose the score above which rows are flagged, so that at most a given share of innocent rows is.

The threshold is the k-th highest of n innocent scores, with `k = floor(rate (n + 1))`, and rows above it are flagged.
Then a new innocent row is flagged with a probability of at most `rate`, for any distribution of the scores (split
conformal prediction, Vovk et al. 2005; here for rows that the direction was not fitted on). Fewer than `1 / rate - 1`
innocent rows cannot distinguish such a rate from 0, which is an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


class MonitorError(ValueError):
    """Raised when a monitor cannot be made, loaded or used; the message says why, and what to do."""


@dataclass(frozen=True)
class Threshold:
    """The score above which a row is flagged.

    Attributes:
        value: The score.
        false_positive_rate: The largest share of innocent rows that it flags, in expectation.
        innocent: The number of innocent scores it was chosen on.
    """

    value: float
    false_positive_rate: float
    innocent: int


def choose_threshold(innocent: Sequence[float], rate: float) -> Threshold:
    """The threshold at a false-positive rate.

    Args:
        innocent: Scores of innocent rows that the monitor was not fitted on.
        rate: The largest share of innocent rows that may be flagged.

    Raises:
        MonitorError: the rate is not between 0 and 1, a score is not finite, or the rows are too few for the rate.
    """
    check_rate(rate, len(innocent))
    if not all(map(math.isfinite, innocent)):
        raise MonitorError("A score is NaN or infinite, so no threshold can be chosen. Are the model's states finite?")
    rank = _rank(rate, len(innocent))
    return Threshold(sorted(innocent, reverse=True)[rank - 1], rate, len(innocent))


def check_rate(rate: float, rows: int) -> None:
    """Check that this many innocent rows can resolve a false-positive rate.

    Raises:
        MonitorError: they cannot; the message says how many are needed.
    """
    if not 0 < rate < 1:
        raise MonitorError(f"A false-positive rate must be between 0 and 1 (got {rate:g}). Use 0.01 for 1 in 100.")
    if _rank(rate, rows) < 1:
        raise MonitorError(
            f"{rows} innocent rows cannot resolve a false-positive rate of {rate:g}, 1 in {1 / rate:.0f}: "
            f"{rows_needed(rate)} or more are needed. Give more innocent rows, or a rate of {1 / (rows + 1):.2g} or "
            "more."
        )


def rows_needed(rate: float) -> int:
    """The fewest innocent rows on which a threshold at this false-positive rate can be chosen."""
    return math.ceil(1 / rate - 1e-9) - 1


def _rank(rate: float, rows: int) -> int:
    return math.floor(rate * (rows + 1) + 1e-9)
