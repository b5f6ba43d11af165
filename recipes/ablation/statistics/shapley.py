"""Exact Shapley shares: how much of the way from one arm to another each factor accounts for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from steertune.recipes.ablation.statistics import Frame

Coalition = frozenset[str]


def shapley(
    value: Callable[[Coalition], NDArray[np.float64]], factors: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    """Shapley value of every factor f, over the coalitions S without f:

    `sum_S |S|! (k - |S| - 1)! / k! [v(S + f) - v(S)]`

    Args:
        value: Score of the arm whose factors in the coalition are at their end, the others at their start; an array
            is taken element by element.
        factors: The k factors. `value` is called with all `2**k` coalitions.
    """
    k = len(factors)
    shares: dict[str, NDArray[np.float64]] = {}
    for factor in factors:
        others = [f for f in factors if f != factor]
        total = np.zeros_like(value(frozenset()), dtype=float)
        for size in range(k):
            weight = math.factorial(size) * math.factorial(k - size - 1) / math.factorial(k)
            for chosen in combinations(others, size):
                coalition = frozenset(chosen)
                total = total + weight * (value(coalition | {factor}) - value(coalition))
        shares[factor] = total
    return shares


def share_rows(scores: Mapping[Coalition, Frame], factors: Sequence[str]) -> dict[str, Frame]:
    """Shapley value of every factor, pair by pair and test row by test row. `scores` maps a coalition to scores by
    task and seed, each an array over the test rows; all have the same pairs."""
    pairs = scores[frozenset()].index
    values = {pair: shapley(lambda coalition, pair=pair: scores[coalition][pair], factors) for pair in pairs}
    return {f: pd.Series([values[pair][f] for pair in pairs], index=pairs, dtype=object) for f in factors}
