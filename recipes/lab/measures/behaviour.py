"""How much of the behaviour generated answers show."""

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("behaviour score of free generations", better="higher", needs=["answers"], trust=2, shares=True)
def behaviour(seen: Seen) -> Array:
    """The task scorer's score of each generated answer, NaN if scoring failed, `(answers,)`."""
    return seen["score"]
