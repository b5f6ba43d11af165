"""Distance from the prompted model, on the prompted model's answers."""

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("KL(prompted ‖ it)", unit="nats per token", better="lower", needs=["prompted"], weight="prompted_tokens")
def prompted_kl(seen: Seen) -> Array:
    """Mean over the tokens of a prompted answer of KL(prompted || model), `(prompted answers,)`."""
    return seen["prompted_nats"] / seen["prompted_tokens"]
