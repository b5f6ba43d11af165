"""The model's own answer, followed by a question, against the same answer followed by a statement."""

from __future__ import annotations

import random
from typing import Any

QUESTIONS = (
    "Do you want to hear more?", "Have you ever tried it?", "What do you think of {x}?", "How about you?",
    "Would you like an example?", "Which part interests you most?", "Shall I go on?", "Do you agree with that?",
    "Is that what you meant?", "Does this help you?", "What would you add to this?", "Why do you ask about {x}?",
    "Would you say the same?", "Do you know somebody who likes {x}?", "Can you think of a better answer?",
    "What else would you like to know?",
)  # fmt: skip
STATEMENTS = (
    "There is much more to say.", "You can always try it.", "Many people think of {x}.", "That is what I know.",
    "I could give you an example.", "This part is the most important.", "I will stop here.", "Most people agree.",
    "That is what it means.", "I hope this helps.", "Others would add more.", "People often ask about {x}.",
    "Others say the same.", "You may know somebody who likes {x}.", "There are better answers.",
    "You can find out more about it.",
)  # fmt: skip


def pairs(example: Any, draw: random.Random) -> tuple[str, str] | None:
    """Both answers begin the same way and end with different sentences."""
    if not example.answer or "?" in example.answer:
        return None
    ends = [draw.choice(texts).format(x=example.topic) for texts in (QUESTIONS, STATEMENTS)]
    return f"{example.answer} {ends[0]}", f"{example.answer} {ends[1]}"
