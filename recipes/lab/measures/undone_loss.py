"""Fluency of generated answers with the behaviour taken out of them, where a rule can do so.

Like `instructed_loss`, it leaves the behaviour out of a measure of damage; unlike it, it does not need a base model
that follows instructions. A rule takes out what it knows, so behaviour that it misses counts as a loss here.
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
