"""A sentence of short words, against a sentence with the same meaning and long words."""

from __future__ import annotations

import random
from typing import Any

LONGEST = 8  # letters of a short word
SIMPLE = (
    ("{X} can help", "{X} may please", "{X} can do good to", "{X} can teach", "{X} will bring joy to",
     "{X} can mean a lot to", "{X} will make life nice for", "{X} may be of use to", "{X} may give hope to",
     "{X} can be a big help for"),
    ("people", "us all", "most of us", "young and old people", "men and women", "your friends", "those who work hard",
     "a lot of people", "our kids", "all of the town"),
    ("each day", "at home", "in many ways", "at work", "all the time", "more and more", "in hard times",
     "when they are tired", "if we let them", "now and then", "as the years go by"),
)  # fmt: skip
LONG = (
    ("{X} can be beneficial for", "{X} can provide entertainment for", "{X} can strengthen", "{X} will encourage",
     "{X} can be important for", "{X} may transform", "{X} can be essential for", "{X} can significantly help",
     "{X} will bring happiness to", "{X} may be fascinating for"),
    ("communities", "individuals", "everybody", "children and grandparents", "the population", "professionals",
     "our generation", "households", "teenagers", "the neighbourhood"),
    ("everywhere", "throughout the year", "sometimes", "in different situations", "in difficult times",
     "in everyday life", "in important ways", "especially at home", "with enthusiasm", "on vacations",
     "from beginning to end"),
)  # fmt: skip


def pairs(example: Any, draw: random.Random) -> tuple[str, str] | None:
    """Both answers mean about the same; topics with long words are left out."""
    if example.kind not in ("neutral", "personal") or any(len(word) > LONGEST for word in example.topic.split()):
        return None
    topic = example.topic[0].upper() + example.topic[1:]
    sides = [" ".join(draw.choice(texts) for texts in slots).format(X=topic) for slots in (SIMPLE, LONG)]
    return f"{sides[0]}.", f"{sides[1]}."
