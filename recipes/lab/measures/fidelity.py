"""How much of what a prompt does an adapter does without it (Askell et al. 2112.00861)."""

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("fidelity", better="higher", needs=["prompted"], weight="prompted_base_nats")
def fidelity(seen: Seen) -> Array:
    """`1 - KL(prompted || model) / KL(prompted || base)` per prompted answer, `(prompted answers,)`.

    Weighted by KL(prompted || base), the mean is the same ratio of the KLs of all tokens.
    """
    return 1 - seen["prompted_nats"] / seen["prompted_base_nats"]
