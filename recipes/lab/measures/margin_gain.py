"""The gain in margin over the base model."""

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("gain in held-out margin", unit="nats", better="higher", needs=["pairs"], trust=5)
def margin_gain(seen: Seen) -> Array:
    """The margin minus the base model's, `(pairs,)`."""
    return seen["margin"] - seen.base["margin"]
