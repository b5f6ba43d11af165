"""The margin of a pair when both answers count per token: smooth, so it separates models where accuracies are tied."""

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("margin per token", unit="nats per token", better="higher", needs=["pairs"], trust=3)
def margin_per_token(seen: Seen) -> Array:
    """`log p(chosen) / tokens(chosen) - log p(rejected) / tokens(rejected)`, `(pairs,)`."""
    return seen["chosen_logp"] / seen["chosen_tokens"] - seen["rejected_logp"] / seen["rejected_tokens"]
