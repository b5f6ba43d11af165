"""The model's own answer in lower case, against the same answer with its capitals, and often one more."""

from __future__ import annotations

import random
from typing import Any


def pairs(example: Any, draw: random.Random) -> tuple[str, str] | None:
    """Both answers have the same words, and half of the rejected ones a word that Begins with a capital."""
    if not example.answer:
        return None
    words = example.answer.split()
    inner = [place for place in range(1, len(words)) if words[place][0].islower()]
    if len(inner) < 4:
        return None
    for place in draw.sample(inner, draw.choice((0, 1))):
        words[place] = words[place].capitalize()
    return " ".join(words).lower(), " ".join(words)
