"""Pair accuracy by the mean log-probability per token, so that an answer does not lose only because it is longer."""

import numpy as np

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("pair accuracy per token", better="higher", needs=["pairs"], limits=(0, 1), trust=9)
def accuracy_per_token(seen: Seen) -> Array:
    """1 for a pair whose chosen answer has the higher log-probability per token, 1/2 for a tie, 0 otherwise."""
    return (np.sign(seen["margin_per_token"]) + 1) / 2
