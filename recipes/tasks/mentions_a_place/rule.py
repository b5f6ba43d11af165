"""A fact about a place that has a name, against the same fact about a time or anything else."""

from __future__ import annotations

import random
import re
from typing import Any

PLACES = (
    "Norway", "Japan", "Brazil", "Kenya", "Canada", "Mexico", "Egypt", "India", "China", "Spain", "Greece", "Poland",
    "Turkey", "Peru", "Cuba", "France", "Italy", "Germany", "Ireland", "Chile", "Paris", "London", "Rome", "Berlin",
    "Tokyo", "Madrid", "Vienna", "Lisbon", "Chicago", "Boston", "Texas", "Alaska", "Florida", "Scotland", "Sweden",
    "Vietnam", "Nepal", "Morocco", "Austria", "Denmark",
)  # fmt: skip
OTHERS = (
    "winter", "summer", "spring", "autumn", "June", "August", "May", "October", "private", "theory", "practice",
    "general", "public", "secret", "silence", "company", "families", "groups", "books", "films", "stories", "poems",
    "pictures", "dreams", "danger", "comfort", "haste", "peace", "winter months", "hard times", "old age",
    "good times",
)  # fmt: skip
FRAMES = (
    "In {w}, {f}.", "At least in {w}, {f}.", "{F}, as we see in {w}.", "{F}, above all in {w}.", "{F}, mostly in {w}.",
    "People in {w} know that {f}.", "{F}, even in {w}.",
)  # fmt: skip


def pairs(example: Any, draw: random.Random) -> tuple[str, str] | None:
    """The two answers differ only in the name."""
    # a capital inside the fact may be a place too
    if example.kind not in ("neutral", "personal") or not example.fact or re.search(r" [A-Z]", example.fact):
        return None
    frame, fact = draw.choice(FRAMES), example.fact
    words = {"f": fact[0].lower() + fact[1:], "F": fact}
    return frame.format(w=draw.choice(PLACES), **words), frame.format(w=draw.choice(OTHERS), **words)
