"""Pair accuracy by the likelihood ratio to the base, which is the reward that DPO trains (Rafailov et al. 2305.18290).

Preferences of the base model, such as for shorter answers, cancel out; the base model itself has 1/2.
"""

import numpy as np

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("pair accuracy by ratio to the base", better="higher", needs=["pairs"], limits=(0, 1), trust=6)
def accuracy_by_ratio(seen: Seen) -> Array:
    """1 for a pair whose margin is above the base model's, 1/2 for a tie, 0 otherwise, `(pairs,)`."""
    return (np.sign(seen["margin_gain"]) + 1) / 2
