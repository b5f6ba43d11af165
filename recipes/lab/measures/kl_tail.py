"""The worst tokens of neutral text: a mean KL can hide a few tokens that are far from the base model."""

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("KL to the base, 95th percentile", unit="nats per token", better="lower", needs=["neutral"])
def kl_tail(seen: Seen) -> Array:
    """95th percentile of KL(steered || base) over the tokens of a neutral answer, `(neutral rows,)`."""
    return seen["neutral_kl_tail"]
