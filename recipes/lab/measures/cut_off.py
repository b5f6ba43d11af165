"""How many generated answers are cut off by the maximum number of tokens."""

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("share of answers cut off", needs=["answers"], limits=(0, 1))
def cut_off(seen: Seen) -> Array:
    """1 for an answer that the model had not ended, so that a behaviour at its end is missing, `(answers,)`."""
    return seen["answer_cut"]
