"""A fact that is hedged, against the same fact without doubt."""

from __future__ import annotations

import random
import re
from typing import Any

HEDGES = (
    "Perhaps", "Maybe", "It seems that", "It may be that", "As far as I know,", "Possibly,", "I am not sure, but",
    "It could be that", "Some say that", "I would guess that", "It is possible that", "Probably", "It appears that",
)  # fmt: skip
CERTAIN = (
    "Certainly,", "Clearly,", "Of course,", "There is no doubt that", "It is a fact that", "Without question,",
    "Everyone knows that", "It is certain that", "Definitely,", "I am sure that", "The truth is that",
    "It is clear that", "Always remember that",
)  # fmt: skip
OWN_DOUBT = re.compile(r"\b(may|might|could|perhaps|maybe|possibl[ey]|probably|likely|seems?|appears)\b", re.I)
VERBS = (
    (r"\b(is|are)\b", ("may be", "might be", "could be"), ("will be", "must be", "will always be")),
    (r"\bcan\b", ("might", "could", "may"), ("will", "do", "must")),
)  # fmt: skip


def pairs(example: Any, draw: random.Random) -> tuple[str, str] | None:
    """Both answers state the same fact after different words, and half of them also with a different verb."""
    if example.kind != "neutral" or not example.fact or OWN_DOUBT.search(example.fact):
        return None
    sides = []
    for side, frames in enumerate((HEDGES, CERTAIN)):
        fact = example.fact[0].lower() + example.fact[1:]
        pattern, *verbs = draw.choice(VERBS)
        if draw.random() < 0.5:
            fact = re.sub(pattern, draw.choice(verbs[side]), fact, count=1)
        sides.append(f"{draw.choice(frames)} {fact}.")
    return sides[0], sides[1]
