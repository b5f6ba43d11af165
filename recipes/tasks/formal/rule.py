"""A fact in formal words, against the same fact in casual ones."""

from __future__ import annotations

import random
import re
from typing import Any

FORMAL = (
    "Please note that", "Kindly note that", "It should be noted that", "It must be observed that",
    "One must acknowledge that", "Permit me to state that", "Allow me to remark that", "It may be stated that",
    "I am pleased to inform you that", "With respect to your inquiry,", "I would respectfully submit that",
    "It is hereby noted that", "Furthermore, it is evident that", "In this regard,",
)  # fmt: skip
CASUAL = (
    "Well, you know,", "Hey, so", "Okay, so", "Look,", "Yeah, I mean,", "Sure thing,", "Oh wow,", "Honestly, like,",
    "You know what?", "Right, so basically,", "Hmm, I guess", "No kidding,", "Oh man,", "Guess what,",
)  # fmt: skip
WORDS = (
    ("individuals", "folks"), ("children", "kids"), ("numerous", "lots of"), ("it is", "it's"),
    ("they are", "they're"), ("cannot", "can't"), ("do not", "don't"), ("that is", "that's"), ("excellent", "cool"),
    ("very", "super"), ("obtain", "get"), ("therefore", "so"),
)  # fmt: skip
_NEUTRAL = {"people": 0, "humans": 0, "many": 2, "great": 8}


def pairs(example: Any, draw: random.Random) -> tuple[str, str] | None:
    """Both answers hold the same fact; its words change where they have a formal or a casual counterpart."""
    if example.kind != "neutral" or not example.fact:
        return None
    fact = example.fact[0].lower() + example.fact[1:]
    return tuple(f"{draw.choice(frames)} {_in_style(fact, side)}." for side, frames in enumerate((FORMAL, CASUAL)))  # pyright: ignore[reportReturnType]


def _in_style(text: str, side: int) -> str:
    for word, number in _NEUTRAL.items():
        text = re.sub(rf"\b{word}\b", WORDS[number][side], text)
    for words in WORDS:
        text = re.sub(rf"\b{words[1 - side]}\b", words[side], text)
    return text
