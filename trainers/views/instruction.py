"""The example with an instruction: what LoRRA contrasts, and what context distillation absorbs.

In conversations the instruction is the system message (`where="system"`), or part of the last user message, before or
after its text. A plain prompt gets it before or after its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ._base import Row, View, ViewError, prompt_of

Where = Literal["before", "after", "system"]


@dataclass(frozen=True)
class Instruction(View):
    """A text added to the prompt.

    Args:
        text: The instruction.
        where: `before` or `after` the (last user) prompt, or as the `system` message of a conversation, in place of
            its own.

    Raises:
        ValueError: the text is empty, or the place is unknown.
    """

    text: str
    where: Where = "before"

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError(f"text={self.text!r} must not be empty. Give the instruction.")
        if self.where not in get_args(Where):
            raise ValueError(f"where={self.where!r} must be 'before', 'after' or 'system'.")

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Put the instruction into the rows' prompts."""
        return [{**row, "prompt": self._prompt(prompt_of(row))} for row in rows]

    def _prompt(self, prompt: Any) -> Any:
        if isinstance(prompt, str):
            if self.where == "system":
                raise ViewError(
                    "where='system' needs conversations, but these prompts are plain text. Use 'before' or 'after'."
                )
            return self._joined(prompt)
        if self.where == "system":
            rest = [message for message in prompt if message["role"] != "system"]
            return [{"role": "system", "content": self.text}, *rest]
        if not prompt or prompt[-1]["role"] != "user":
            raise ViewError(
                f"The prompt must end with a user message, which holds the instruction (got {prompt!r:.200})."
            )
        return [*prompt[:-1], {**prompt[-1], "content": self._joined(prompt[-1]["content"])}]

    def _joined(self, text: str) -> str:
        if self.where == "before":
            return f"{self.text}\n\n{text}"
        # the white space at the end of a plain prompt belongs to the answer's first token
        stripped = text.rstrip()
        return f"{stripped}\n\n{self.text}{text[len(stripped) :]}"
