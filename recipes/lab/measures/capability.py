"""General knowledge: completing simple sentences that have nothing to do with any behaviour."""

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("sentences ended right", better="higher", needs=["questions"], limits=(0, 1))
def capability(seen: Seen) -> Array:
    """1 if the right one of four words is the likeliest, `(sentences,)`; NaN if two begin with the same token."""
    return seen["question_right"]
