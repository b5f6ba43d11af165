"""How much generated answers repeat themselves."""

import numpy as np

from steertune.recipes.lab.measures import Array, Seen, measure

_WORDS = 3


@measure("repetition", better="lower", needs=["answers"], limits=(0, 1))
def repetition(seen: Seen) -> Array:
    """Share of an answer's word triples that occur earlier in the same answer; NaN for a shorter one, `(answers,)`."""
    return np.array([repeated(str(text)) for text in seen["answer"]])


def repeated(text: str) -> float:
    """Share of a text's word triples that occur earlier in it; NaN for a text without any."""
    words = text.split()
    triples = [tuple(words[i : i + _WORDS]) for i in range(len(words) - _WORDS + 1)]
    return 1 - len(set(triples)) / len(triples) if triples else float("nan")
