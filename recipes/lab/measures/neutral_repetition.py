"""How much answers to neutral prompts repeat themselves."""

import numpy as np

from steertune.recipes.lab.measures import Array, Seen, measure
from steertune.recipes.lab.measures.repetition import repeated


@measure("repetition in neutral answers", better="lower", needs=["answers"], limits=(0, 1))
def neutral_repetition(seen: Seen) -> Array:
    """The `repetition` of answers to neutral prompts, `(answers,)`."""
    return np.array([repeated(str(text)) for text in seen["neutral_answer"]])
