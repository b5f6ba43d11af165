"""How often the model's most likely token is that of the prompted model."""

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("likeliest token as prompted", better="higher", needs=["prompted"], weight="prompted_tokens", limits=(0, 1))
def agreement(seen: Seen) -> Array:
    """Share of a prompted answer's tokens where the likeliest one is the prompted model's, `(prompted answers,)`."""
    return seen["prompted_agreed"] / seen["prompted_tokens"]
