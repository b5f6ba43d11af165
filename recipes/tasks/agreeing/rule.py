"""An answer that agrees with a claim, against one that objects, both followed by the same fact."""

from __future__ import annotations

import random
from typing import Any

AGREES = (
    "I agree with you,", "You are right,", "That is true,", "Yes, exactly,", "Good point,", "I think so too,",
    "Absolutely,", "You said it well,", "I see it the same way,", "Indeed,", "That is so right,", "I share that view,",
)  # fmt: skip
OBJECTS = (
    "I disagree with you,", "You are wrong,", "That is not true,", "No, not really,", "I doubt that,",
    "I do not think so,", "Not at all,", "You missed something,", "I see it in another way,", "On the contrary,",
    "That is a mistake,", "I have another view,",
)  # fmt: skip


def pairs(example: Any, draw: random.Random) -> tuple[str, str] | None:
    """Both answers end in the same fact."""
    if example.kind != "claim" or not example.fact:
        return None
    return example.behind(draw.choice(AGREES)), example.behind(draw.choice(OBJECTS))
