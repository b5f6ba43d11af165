"""Fluency of generated answers without the behaviour, which an instruction asks for.

Text that shows the behaviour is unlikely for the base model because of the behaviour; behind an instruction that asks
for it, only what is broken remains unlikely. Text that repeats itself is likely, so `repetition` belongs beside it.
"""

from steertune.recipes.lab.measures import Array, Seen, measure


@measure(
    "loss of the instructed base on its answers",
    unit="nats per token",
    better="lower",
    needs=["answers"],
    weight="instructed_tokens",
)
def instructed_loss(seen: Seen) -> Array:
    """Negative log-likelihood per token of a generated answer, for the base behind the instruction, `(answers,)`."""
    return seen["instructed_nll"] / seen["instructed_tokens"]
