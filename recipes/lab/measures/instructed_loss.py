"""Fluency of generated answers, with the behaviour discounted by an instruction that asks for it.

Text that shows the behaviour is unlikely for the base model because of the behaviour; after an instruction that asks
for it, only broken text remains unlikely. Text that repeats itself is likely, so read this together with `repetition`.
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
    """Negative log-likelihood per token of a generated answer, for the base with the instruction, `(answers,)`."""
    return seen["instructed_nll"] / seen["instructed_tokens"]
