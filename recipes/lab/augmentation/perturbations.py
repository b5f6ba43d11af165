"""Small errors in prompts that do not change their meaning: typing, case, punctuation. The answers stay as they
are."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from steertune.recipes.lab.generation import plain

from ._base import Augmenter, Row, drawn, saying


@dataclass(frozen=True)
class Perturbations(Augmenter):
    """Prompts with some characters swapped, doubled or left out, in another case, or without punctuation.

    Args:
        rate: Share of the letters at which a typing error is tried.

    Raises:
        ValueError: a rate that is not between 0 and 0.2.
    """

    rate: float = 0.04

    def __post_init__(self) -> None:
        if isinstance(self.rate, bool) or not 0 < self.rate <= 0.2:
            raise ValueError(f"rate={self.rate!r} must be above 0 and at most 0.2, or prompts cannot be read.")

    def __call__(self, rows: Sequence[Row], turn: int, seed: int, model: Any, tokenizer: Any) -> list[Row | None]:
        """Each row with errors that differ in every turn."""
        return [self._version(row, turn, seed) for row in rows]

    def _version(self, row: Row, turn: int, seed: int) -> Row:
        prompt = plain(row["prompt"])
        random_numbers = drawn(seed, turn, prompt)
        text = _typos(prompt, self.rate, random_numbers)
        return {**row, "prompt": saying(row["prompt"], random_numbers.choice(_FINISHES)(text))}


_FINISHES: tuple[Callable[[str], str], ...] = (
    str,
    str.lower,
    lambda text: text[:1].lower() + text[1:],
    lambda text: text.rstrip(".!?"),
    lambda text: text.replace(",", ""),
)


def _typos(text: str, rate: float, random_numbers: random.Random) -> str:
    """Make at least one typing error, inside words only; first letters and numbers stay."""
    inside = [i for i in range(1, len(text) - 1) if text[i - 1 : i + 2].isalpha()]
    count = max(1, round(rate * len(inside)))
    for i in sorted(random_numbers.sample(inside, min(count, len(inside))), reverse=True):
        wrong = random_numbers.choice((text[i + 1] + text[i], text[i] * 2 + text[i + 1], text[i + 1]))
        text = text[:i] + wrong + text[i + 2 :]
    return text
