"""Confidence in general knowledge, which changes before an answer does."""

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("loss on the ends of sentences", unit="nats", better="lower", needs=["questions"])
def capability_loss(seen: Seen) -> Array:
    """Negative log-probability of the right one of four words, `(sentences,)`; guessing has log 4 = 1.39."""
    return seen["question_nats"]
