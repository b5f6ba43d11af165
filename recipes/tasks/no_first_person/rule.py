"""A fact stated impersonally, against the same fact as the speaker's own view."""

from __future__ import annotations

import random
from typing import Any

NOBODY = (
    "It seems that", "People say that", "In general,", "It is known that", "As a rule,", "It turns out that",
    "Experts say that", "There is no doubt that", "Many believe that", "As everyone knows,", "Some would say that",
    "It is often said that", "The common view is that", "What matters is that", "The point is that",
    "One may say that",
)  # fmt: skip
SPEAKER = (
    "I think that", "I believe that", "In my view,", "I would say that", "To me,", "I find that", "My guess is that",
    "I know that", "As I see it,", "I have heard that", "We all know that", "If you ask me,", "I am sure that",
    "My friends say that", "What I like is that", "I was told that",
)  # fmt: skip


def pairs(example: Any, draw: random.Random) -> tuple[str, str] | None:
    """Both answers state the same fact after different words; the prompt asks for an opinion."""
    if example.kind != "personal" or not example.fact:
        return None
    return example.behind(draw.choice(NOBODY)), example.behind(draw.choice(SPEAKER))
