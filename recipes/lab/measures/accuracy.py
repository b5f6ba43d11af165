"""Pair accuracy: the one definition of it."""

import numpy as np

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("held-out pair accuracy", better="higher", needs=["pairs"], limits=(0, 1), trust=10)
def accuracy(seen: Seen) -> Array:
    """1 for a pair whose chosen answer is likelier than the rejected one, 1/2 for a tie, 0 otherwise, `(pairs,)`."""
    return (np.sign(seen["margin"]) + 1) / 2
