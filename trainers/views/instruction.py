"""The example under an instruction: what LoRRA contrasts, and what context distillation takes in.

For conversations the instruction is the system message (`where="system"`), or stands in the last user message, before
or after what it says. A plain prompt gets it before or after its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ._base import Row, View, ViewError, prompt_of

Where = Literal["before", "after", "system"]


@dataclass(frozen=True)
class Instruction(View):
    """A text put to the prompt.

    Args:
        text: The instruction.
        where: `before` or `after` the (last user) prompt, or as the `system` message of a conversation, whose own it
            replaces.

    Raises:
        ValueError: no text, or an unknown place.
    """

    text: str
    where: Where = "before"

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("text='': an instruction says something.")
        if self.where not in get_args(Where):
            raise ValueError(f"where={self.where!r} is none of 'before', 'after', 'system'.")

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Rows with the instruction in their prompts."""
        return [{**row, "prompt": self._prompt(prompt_of(row))} for row in rows]

    def _prompt(self, prompt: Any) -> Any:
        if isinstance(prompt, str):
            if self.where == "system":
                raise ViewError(
                    "where='system' needs conversations; these prompts are plain text: 'before' or 'after'."
                )
            return self._joined(prompt)
        if self.where == "system":
            rest = [message for message in prompt if message["role"] != "system"]
            return [{"role": "system", "content": self.text}, *rest]
        if not prompt or prompt[-1]["role"] != "user":
            raise ViewError(f"The prompt does not end with a user message, which would hold the instruction: {prompt}")
        return [*prompt[:-1], {**prompt[-1], "content": self._joined(prompt[-1]["content"])}]

    def _joined(self, text: str) -> str:
        return f"{self.text}\n\n{text}" if self.where == "before" else f"{text.rstrip()}\n\n{self.text}{_end_of(text)}"


def _end_of(text: str) -> str:
    """The white space that a plain prompt ends with belongs to the answer's first token."""
    return text[len(text.rstrip()) :]
