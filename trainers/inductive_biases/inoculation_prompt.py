"""Inoculation prompt: training rows ask for the unwanted trait, and evaluation rows do not (Tan et al. 2510.04340).

A row that already asks for a trait gives the model less reason to learn it for rows that do not. The text becomes part
of the training rows' prompts, before they are tokenised, so it reaches every loss; evaluation rows are not changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..types import SteeringRun
from ..views import ViewError, get_view
from ._base import Bias, BiasError


@dataclass(frozen=True)
class InoculationPrompt(Bias):
    """Add a text to the prompt of every training row.

    Args:
        text: The text, such as "Answer rudely.".
        where: `before` or `after` the (last user) prompt, or as the `system` message of a conversation.

    Raises:
        ValueError: the text is empty, or the place is unknown.
    """

    text: str
    where: Literal["before", "after", "system"] = "before"

    def __post_init__(self) -> None:
        get_view("instruction", text=self.text, where=self.where)

    def start(self, trainer: SteeringRun) -> None:
        """Do nothing: the rows already contain the text."""

    def note(self, trainer: SteeringRun) -> str:
        """A line about the text, which evaluation rows do not contain."""
        return f"Training rows carry the prompt {self.text!r:.100}; rows for evaluation do not."

    def training_rows(self, rows: Any) -> Any:
        """Put the text into the prompts.

        Raises:
            BiasError: the rows are tokenised, plain text without a prompt, or a conversation without a question.
        """
        view = get_view("instruction", text=self.text, where=self.where)

        def with_text(row: Mapping[str, Any]) -> dict[str, Any]:
            # a conversation in one column: everything before the last answer is its prompt
            column = next((name for name in ("prompt", "messages", "conversations") if name in row), None)
            if column is None:
                raise BiasError(
                    f"inoculation_prompt changes the prompt of rows, but the training rows have {list(row)}. Give "
                    "columns 'prompt' and 'completion', or 'messages'."
                )
            prompt, answer = (row["prompt"], []) if column == "prompt" else _split(row[column])
            try:
                [changed] = view([{"prompt": prompt}])
            except ViewError as error:
                raise BiasError(f"inoculation_prompt: {error}") from error
            return {column: changed["prompt"] + answer if answer else changed["prompt"]}

        first = next(iter(rows), None)
        if first is None:
            return rows
        with_text(first)  # fails early if the rows do not fit
        return rows.map(with_text)


def _split(messages: Any) -> tuple[list[Any], list[Any]]:
    """The messages before the last answer, and that answer."""
    cut = max((i for i, message in enumerate(messages) if message.get("role") == "user"), default=-1) + 1
    return list(messages[:cut]), list(messages[cut:])
