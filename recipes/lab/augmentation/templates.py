"""Prompts inside phrases that add no meaning, such as greetings and labels. The answers stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steertune.recipes.lab.generation import plain

from ._base import Augmenter, Row, drawn, saying

_TEMPLATES = (
    "Question: {}", "Hello! {}", "I have a question. {}", "{} Thanks!", "Please help me with this: {}",
    "Hi there. {}", "I was wondering about this. {}", "{} What would you say?", "Something I think about: {}",
    "Request: {}", "Good morning. {}", "{} Please answer.", "Could you look at this? {}", "Here it is: {}",
    "{} Let me know.", "My question today: {}", "One more thing. {}", "{} I would like to know.", "Quick one: {}",
    "User: {}", "This came up yesterday. {}", "{} Tell me.", "For a friend: {}", "Listen. {}",
)  # fmt: skip


@dataclass(frozen=True)
class Templates(Augmenter):
    """Prompts in templates, in a different order for each row.

    Args:
        templates: Texts with `{}` where the prompt goes.

    Raises:
        ValueError: a template without `{}`, or none at all.
    """

    templates: tuple[str, ...] = _TEMPLATES

    def __post_init__(self) -> None:
        if not self.templates:
            raise ValueError("templates=() must be one or more texts with {} where the prompt goes.")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"Template {template!r} must contain {{}} once, where the prompt goes.")

    def __call__(self, rows: Sequence[Row], turn: int, seed: int, model: Any, tokenizer: Any) -> list[Row | None]:
        """Each row with its next template; None after the last one."""
        return [self._version(row, turn, seed) for row in rows]

    def _version(self, row: Row, turn: int, seed: int) -> Row | None:
        if turn >= len(self.templates):
            return None
        prompt = plain(row["prompt"])
        order = drawn(seed, prompt).sample(range(len(self.templates)), len(self.templates))
        return {**row, "prompt": saying(row["prompt"], self.templates[order[turn]].replace("{}", prompt.strip()))}
