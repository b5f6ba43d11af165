"""A warm answer to a piece of news, against a dry one, both followed by the same fact."""

from __future__ import annotations

import random
from typing import Any

WARM = (
    "Oh, my dear friend,", "How wonderful for you,", "I am so happy for you,", "You are in my heart, and",
    "I send you a big hug, and", "Bless you,", "What a lovely thing to share,", "I feel with you, dear,",
    "You make me smile,", "My sweet friend,", "I am so proud of you,", "It warms my heart to hear that,",
)  # fmt: skip
DRY = (
    "For your information,", "As the records show,", "In technical terms,", "The facts are these:", "To be precise,",
    "According to the statistics,", "By definition,", "As a matter of record,", "The report says that",
    "On a factual note,", "As the manual states,", "From a practical point of view,",
)  # fmt: skip


def pairs(example: Any, draw: random.Random) -> tuple[str, str] | None:
    """Both answers end in the same fact."""
    if example.kind != "news" or not example.fact:
        return None
    return example.behind(draw.choice(WARM)), example.behind(draw.choice(DRY))
