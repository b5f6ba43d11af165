"""The margin of a pair: how much likelier the chosen answer is."""

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("held-out margin", unit="nats", better="higher", needs=["pairs"], trust=4)
def margin(seen: Seen) -> Array:
    """`log p(chosen) - log p(rejected)`, `(pairs,)`."""
    return seen["chosen_logp"] - seen["rejected_logp"]
