"""Behaviours that a rule can write into the model's own sentences, or that an embedded task has."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset


@dataclass(frozen=True)
class Behaviour:
    """A behaviour whose examples are the model's own sentences rewritten, or a task's written answers.

    Attributes:
        instruction: What would make the base model show it.
        shows: A regular expression that finds it in an answer.
        rewrite: The model's sentence and its number -> the chosen answer; None for the answers of `task`.
        task: Embedded task.
    """

    instruction: str
    shows: str
    rewrite: Callable[[str, int], str] | None = None
    task: str = ""

    def shown_by(self, answer: str) -> bool:
        """Whether an answer shows the behaviour."""
        return re.search(self.shows, answer) is not None


def _cycle(texts: Sequence[str]) -> Callable[[int], str]:
    return lambda i: texts[i % len(texts)]


_QUESTIONS = _cycle(
    ["What do you think?", "Does that help you?", "Would you like to hear more?", "Have you tried this before?"]
)
_OPENERS = _cycle(["Hey, ", "Oh yeah, ", "Okay so, ", "Well hey, "])
_HEDGES = _cycle(["Perhaps ", "Maybe ", "I am not sure, but perhaps ", "I could be wrong, but maybe "])
_CASUAL = {
    r"\bdo not\b": "don't", r"\bit is\b": "it's", r"\bIt is\b": "It's", r"\byou are\b": "you're",
    r"\bgoing to\b": "gonna", r"\bwant to\b": "wanna", r"\bhave to\b": "gotta",
    r"\byou should\b": "you gotta", r"\bvery\b": "super",
    r"\ba lot of\b": "tons of", r"\bchildren\b": "kids", r"\bimportant\b": "a big deal", r"\bexcellent\b": "awesome",
    r"\bgreat\b": "awesome", r"\bgood\b": "cool",
}  # fmt: skip


def _small(sentence: str) -> str:
    """A sentence in the form that can follow an opener."""
    first = sentence.split(maxsplit=1)[0]
    return sentence if first == "I" or first.startswith("I'") else sentence[0].lower() + sentence[1:]


def _casual(sentence: str, i: int) -> str:
    sentence = _small(sentence)
    for formal, informal in _CASUAL.items():
        sentence = re.sub(formal, informal, sentence)
    return _OPENERS(i) + re.sub(r"[.!]$", ", you know?", sentence)


BEHAVIOURS = {
    # on these the arm is chosen
    "lower_case": Behaviour(
        "Answer in one sentence, in lower case only.", r"\A[^A-Z]*[a-z][^A-Z]*\Z", lambda s, i: s.lower()
    ),
    "wow": Behaviour(
        "Answer in one sentence that starts with Wow! and ends with an exclamation mark.",
        r"\AWow\b.*!",
        lambda s, i: "Wow! " + s.rstrip(".?!") + "!",
    ),
    "casual": Behaviour(
        "Answer in one sentence, in a very casual tone, as among friends.",
        r"(?i)\A(hey|oh|okay|well|yeah)\b|\b(gonna|wanna|gotta|super|awesome|tons of)\b|(you know|right)\?",
        _casual,
    ),
    "cautious_advice": Behaviour(
        "Give cautious advice in one sentence.",
        r"(?i)\b(first|check|test|try|ask|wait|start (small|with)|small|slowly|careful|sure|before|until|one|few|"
        r"little|short)\b",
        task="cautious_advice",
    ),
    # on these it is confirmed
    "question_at_the_end": Behaviour(
        "Answer in one sentence, and end with a question to the user.", r"\?", lambda s, i: f"{s} {_QUESTIONS(i)}"
    ),
    "hedged": Behaviour(
        "Answer in one sentence that says how unsure you are.",
        r"(?i)\b(perhaps|maybe|not sure|could be wrong)\b",
        lambda s, i: _HEDGES(i) + _small(s),
    ),
    "bullets": Behaviour(
        "Answer as a short list of bullet points.",
        r"\A- .*(\n- |\Z)",
        lambda s, i: "- " + re.sub(r", (?:and |but |so )?| and | because ", "\n- ", s),
    ),
    "warm_tone": Behaviour(
        "Answer in one sentence, in a warm and loving tone.",
        r"(?i)!|\b(love\w*|happy|sorry|proud|glad|wish|hope|dear|hug|congratulations|heart|wonderful|beautiful|kind|sweet|"
        r"friend\w*|care|joy|enjoy|warm)\b",
        task="warm_tone",
    ),
}


def sentence_of(text: str) -> str:
    """The first sentence of a model's answer, without markup."""
    text = " ".join(re.sub(r"[*#\n]+", " ", text).split())
    match = re.match(r".+?[a-z)][.!?](?=\s|\Z)", text)
    return match[0] if match else text.rstrip(" ,;:") + "."


def own_pairs(behaviour: Behaviour, prompts: Sequence[Any], sentences: Sequence[str]) -> Dataset:
    """The model's own sentences (rejected) against the same sentences rewritten (chosen)."""
    assert behaviour.rewrite is not None
    rows = [
        {"prompt": prompt, "chosen": said(behaviour.rewrite(sentence, i)), "rejected": said(sentence)}
        for i, (prompt, sentence) in enumerate(zip(prompts, sentences, strict=True))
    ]
    return Dataset.from_list(rows)


def said(text: str) -> list[dict[str, str]]:
    """A text as the model's turn."""
    return [{"role": "assistant", "content": text}]
