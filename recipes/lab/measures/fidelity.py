"""How much of a prompt's effect an adapter has without it (Askell et al. 2112.00861)."""

import numpy as np

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("fidelity", better="higher", needs=["prompted"], weight="prompted_base_nats", trust=1)
def fidelity(seen: Seen) -> Array:
    """`1 - KL(prompted || model) / KL(prompted || base)` per prompted answer, `(prompted answers,)`.

    Weighted by KL(prompted || base), the mean is the same formula with the KLs summed over all tokens.
    """
    base = seen["prompted_base_nats"]
    ratio = np.full_like(base, np.nan)  # if the prompt changes nothing, there is nothing to learn
    np.divide(seen["prompted_nats"], base, out=ratio, where=base > 0)
    return 1 - ratio
