"""How many generated answers the tokens allowed cut off."""

from steertune.recipes.lab.measures import Array, Seen, measure


@measure("share of answers cut off", needs=["answers"], limits=(0, 1))
def cut_off(seen: Seen) -> Array:
    """1 for an answer that the model had not ended, so that no end shows what it may show, `(answers,)`."""
    return seen["answer_cut"]
