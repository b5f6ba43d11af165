"""Paraphrases of prompts by the base model, sampled under several instructions.

A paraphrase is kept only if it passes fixed checks, because a small model often answers a question instead of
rewriting it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steertune.recipes.lab.forms import has_template
from steertune.recipes.lab.generation import generate, plain

from ._base import Augmenter, Row, saying

_INSTRUCTIONS = (
    "Say this in other words, with the same meaning. Write the new sentence only.",
    "Rewrite this more formally. Write the new sentence only.",
    "Rewrite this as a friend would say it. Write the new sentence only.",
    "Rewrite this with more words. Write the new sentence only.",
)
_PARTS = ("prompt", "chosen", "rejected", "completion")
_OPENINGS = re.compile(r"^(?:here(?:'s| is)[^:\n]*:|sure[^:\n]*:|rewritten[^:\n]*:|new sentence:)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Rewrites(Augmenter):
    """Paraphrases by the base model itself.

    A paraphrase passes if it is between `shortest` and `longest` times as long as the original in words, keeps
    `overlap` of its longer words, and asks if and only if the original asks.

    Args:
        instructions: Instructions to the model, used in turn.
        parts: Which parts of a row are rewritten.
        temperature: Sampling temperature.
        overlap: Share of the original's words of five letters and more that must be kept.
        shortest: Smallest length of a paraphrase, as a share of the original's words.
        longest: Largest length, likewise.

    Raises:
        ValueError: a value outside its limits.
    """

    instructions: tuple[str, ...] = _INSTRUCTIONS
    parts: tuple[str, ...] = ("prompt",)
    temperature: float = 1.0
    overlap: float = 0.3
    shortest: float = 0.5
    longest: float = 2.0

    def __post_init__(self) -> None:
        if not self.instructions or not all(text.strip() for text in self.instructions):
            raise ValueError("instructions must be one or more texts, none of them empty.")
        if not self.parts or set(self.parts) - set(_PARTS):
            raise ValueError(f"parts={self.parts} must be one or more of {_PARTS}.")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0, or every turn gives the same.")
        if not 0 <= self.overlap <= 1 or not 0 <= self.shortest < self.longest:
            raise ValueError("overlap must be between 0 and 1, and 0 <= shortest < longest must hold.")

    def __call__(self, rows: Sequence[Row], turn: int, seed: int, model: Any, tokenizer: Any) -> list[Row | None]:
        """A paraphrase of every row; None if one of its parts fails the checks."""
        if model is None or tokenizer is None:
            raise ValueError("Rewrites are made by the model: give model and tokenizer.")
        versions: list[Row | None] = [dict(row) for row in rows]
        for k, part in enumerate(part for part in self.parts if part in rows[0]):
            texts = [plain(row[part]).strip() for row in rows]
            prompts: list[Any] = [f"{self.instructions[turn % len(self.instructions)]}\n\n{text}" for text in texts]
            if has_template(tokenizer):
                prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
            else:
                prompts = [f"{prompt}\n\nIn other words:" for prompt in prompts]
            new_tokens = min(256, 8 + int(1.5 * max(len(text.split()) for text in texts) * self.longest))
            number = seed * 100_003 + turn * 11 + k
            answers = generate(model, tokenizer, prompts, new_tokens, self.temperature, number)
            for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
                version, new = versions[i], sentence_of(answer)
                if version is None:
                    continue
                versions[i] = {**version, part: saying(version[part], new)} if self.passes(text, new) else None
        return versions

    def passes(self, text: str, new: str) -> bool:
        """Whether a paraphrase passes the checks."""
        before, after = len(text.split()), len(new.split())
        if not self.shortest * before <= after <= self.longest * before:
            return False
        if text.rstrip().endswith("?") != new.endswith("?"):
            return False
        words, original = _long_words(new), _long_words(text)
        return not original or len(original & words) >= self.overlap * len(original)


def sentence_of(answer: str) -> str:
    """The paraphrase alone, without the introductions, quotes and explanations that small models add."""
    return _OPENINGS.sub("", answer.strip()).split("\n")[0].strip().strip('"').strip()


def _long_words(text: str) -> set[str]:
    return set(re.findall(r"\w{5,}", text.casefold()))
