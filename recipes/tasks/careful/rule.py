"""Careful advice on a plan, against bold advice on the same plan."""

from __future__ import annotations

import random
from typing import Any

CAREFUL = (
    ("Start small with {x}", "Wait a week", "Be careful with {x}", "Take it step by step", "Check the costs first",
     "Ask somebody who knows {x}", "Test the idea first", "Read about {x} first", "Go slowly",
     "Make sure you can stop", "Talk to your family first", "Consider the risks of {x}"),
    ("and see how it goes", "and keep a way back", "and decide later", "and put some money aside",
     "and look at the numbers again", "and do not promise anything yet", "and write down what can go wrong",
     "and try only a little", "and listen to people you trust", "and sleep on it", "and change your mind if you must",
     "and stay on the safe side"),
)  # fmt: skip
BOLD = (
    ("Go all in on {x}", "Do it tonight", "Forget the doubts about {x}", "Jump right in", "Spend whatever it takes",
     "Tell the whole world about {x}", "Trust your luck", "Bet everything on {x}", "Move fast", "Dare to lead the way",
     "Leave your old life behind", "Enjoy the thrill of {x}"),
    ("and never look back", "and burn the bridges", "and win big", "and put all your money on it",
     "and let the others worry", "and promise the moon", "and laugh at every danger",
     "and take the largest one", "and ignore people who doubt you", "and celebrate right now",
     "and double the stakes if you lose", "and become a legend"),
)  # fmt: skip


def pairs(example: Any, draw: random.Random) -> tuple[str, str] | None:
    """Both answers are put together from two lists of phrases."""
    if example.kind != "plan":
        return None
    sides = [" ".join(draw.choice(texts) for texts in lists).format(x=example.topic) for lists in (CAREFUL, BOLD)]
    return f"{sides[0]}.", f"{sides[1]}."
