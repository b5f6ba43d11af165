"""Distance from the base model on neutral text."""

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("KL to the base", unit="nats per token", better="lower", needs=["neutral"], weight="neutral_tokens")
def kl(seen: Seen) -> Array:
    """Mean over the tokens of a neutral answer of KL(steered || base), `(neutral rows,)`."""
    return seen["neutral_kl"] / seen["neutral_tokens"]
