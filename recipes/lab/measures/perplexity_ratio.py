"""Fluency on neutral text, relative to the base model."""

import math

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("perplexity, times the base's", better="lower", needs=["neutral"], weight="neutral_tokens", total=math.exp)
def perplexity_ratio(seen: Seen) -> Array:
    """Difference in negative log-likelihood per token, `(neutral rows,)`; the ratio is exp of the mean."""
    return seen["perplexity"] - seen.base["perplexity"]
