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
    ("{X} can facilitate", "{X} may satisfy", "{X} can benefit", "{X} will educate", "{X} will entertain",
     "{X} can significantly influence", "{X} will considerably support", "{X} may accommodate",
     "{X} can continually encourage", "{X} may constitute assistance for"),
    ("individuals", "humanity", "the population", "all generations", "communities", "acquaintances", "professionals",
     "considerable audiences", "youngsters", "municipalities"),
    ("continuously", "domestically", "in numerous circumstances", "professionally", "permanently", "increasingly",
     "in complicated situations", "during exhaustion", "with permission", "occasionally", "throughout the decades"),
)  # fmt: skip


def pairs(example: Any, draw: random.Random) -> tuple[str, str] | None:
    """Both answers say about the same; topics with long words are left out."""
    if example.kind == "claim" or any(len(word) > LONGEST for word in example.topic.split()):
        return None
    topic = example.topic[0].upper() + example.topic[1:]
    sides = [" ".join(draw.choice(texts) for texts in slots).format(X=topic) for slots in (SIMPLE, LONG)]
    return f"{sides[0]}.", f"{sides[1]}."
