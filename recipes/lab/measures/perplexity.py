"""Fluency on neutral text."""

import math

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("perplexity", better="lower", needs=["neutral"], weight="neutral_tokens", total=math.exp)
def perplexity(seen: Seen) -> Array:
    """Negative log-likelihood per token of a neutral answer, `(neutral rows,)`; the perplexity is exp of the mean."""
    return seen["neutral_nll"] / seen["neutral_tokens"]
