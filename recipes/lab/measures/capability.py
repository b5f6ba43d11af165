"""What a model still knows: easy questions with fixed answers, which no behaviour is about."""

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("easy questions right", better="higher", needs=["questions"])
def capability(seen: Seen) -> Array:
    """1 where the right one of four answers is the likeliest, `(questions,)`; NaN where they begin alike."""
    return seen["question_right"]
