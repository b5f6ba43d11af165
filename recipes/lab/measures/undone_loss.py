"""Fluency of generated answers after a rule has removed the behaviour from them.

Like `instructed_loss`, it keeps the behaviour itself from counting as damage; unlike it, it does not need a base model
that follows instructions. Behaviour that the rule misses counts as damage here.
"""

from steertune.recipes.lab.measures import Array, Seen, measure


@measure(
    "loss of the base on its answers without the behaviour",
    unit="nats per token",
    better="lower",
    needs=["answers"],
    weight="undone_tokens",
)
def undone_loss(seen: Seen) -> Array:
    """Negative log-likelihood per token of a generated answer after the task's `[undo]`, `(answers,)`."""
    return seen["undone_nll"] / seen["undone_tokens"]
