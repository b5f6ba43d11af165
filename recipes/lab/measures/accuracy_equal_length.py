"""Pair accuracy corrected for the length of the answers: how often the chosen answer would win at equal length.

A log-probability is a sum over tokens, so length enters a margin as a cost per token. The least-squares line of the
margins on the difference in tokens estimates this cost, and the margin without it decides the pair. Dubois et al.
(2404.04475) do the same for win rates: a regression with a length term that is then set to zero. With margins, where
the relation is linear, every pair has its own value, and no fit diverges if length alone decides all pairs. If all
pairs differ by the same number of tokens, the cost cannot be estimated, and the values are NaN.
"""

import numpy as np

from steertune.recipes.lab.measures import Array, Seen, measure

_ROUNDING = 1e-9  # share of the largest margin below which the rest of a margin is a tie


@measure("pair accuracy at equal length", better="higher", needs=["pairs"], limits=(0, 1), trust=8)
def accuracy_equal_length(seen: Seen) -> Array:
    """1 for a pair whose margin without the cost of length is above zero, 1/2 for a tie, 0 otherwise, `(pairs,)`."""
    margins, longer = seen["margin"], seen["chosen_tokens"] - seen["rejected_tokens"]
    if not longer.any():
        return seen["accuracy"]
    spread = longer - longer.mean()
    if not spread.any() or len(margins) < 3 or not np.isfinite(margins).all():
        return np.full_like(margins, np.nan)
    nats_per_token = spread @ margins / (spread @ spread)
    left = margins - nats_per_token * longer
    left[np.abs(left) <= _ROUNDING * np.abs(margins).max()] = 0.0
    return (np.sign(left) + 1) / 2
