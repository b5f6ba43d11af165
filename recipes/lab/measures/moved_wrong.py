"""How often a steered model moves a pair in the wrong direction: a mean gain can hide it (Tan et al. 2407.12404)."""

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("pairs moved the wrong way", better="lower", needs=["pairs"], limits=(0, 1), trust=7)
def moved_wrong(seen: Seen) -> Array:
    """1 for a pair whose margin is below the base model's, `(pairs,)`."""
    return (seen["margin"] < seen.base["margin"]).astype(float)
