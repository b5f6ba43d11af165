"""Conversations and plain text: the form of the rows follows the tokenizer.

A tokenizer with a chat template reads both. The tokenizer of a base model has none, and reads conversations as text:

    Question: How many days are there in a leap year?
    Answer: A leap year has 366 days, because February has 29 days instead of 28.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from jinja2 import TemplateError

from steertune.recipes.lab.files import ArmError

NOTE = (
    "The tokenizer has no chat template, so conversations are read as plain text: `Question: ...`, then `Answer: ...` "
    "on the next line. Another form needs plain-text prompts and answers, or a tokenizer with a chat template."
)
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "model")
"""Roles in a conversation; models have never read messages with others."""
_SPEAKERS = {"user": "Question: ", "assistant": "Answer: "}
_ANSWERS = ("chosen", "rejected", "completion")


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return tokenizer.chat_template is not None


def conversations(rows: Dataset) -> list[str]:
    """The columns that hold lists of messages."""
    first = rows[0] if len(rows) else {}
    return [name for name, value in first.items() if isinstance(value, list) and value and isinstance(value[0], dict)]


def notes_on_form(rows: Dataset, tokenizer: Any) -> list[str]:
    """Notes for the user on rows that will be read in another form; empty if they are read as they are."""
    return [NOTE] if conversations(rows) and not has_template(tokenizer) else []


def readable(rows: Dataset, tokenizer: Any) -> Dataset:
    """Rows in a form that the tokenizer reads; without a chat template, conversations become plain text.

    Raises:
        ArmError: a message is not a text of the system, the user or the assistant; the message names the row.
    """
    columns = conversations(rows)
    if not columns or has_template(tokenizer):
        return rows
    texts = [_as_text(i, dict(row), columns) for i, row in enumerate(rows)]
    return Dataset.from_list(texts)


def written(tokenizer: Any, prompt: Any) -> str:
    """A prompt as the model reads it: a text as it is, messages through the chat template.

    Raises:
        ArmError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if isinstance(prompt, str):
        return prompt
    if not has_template(tokenizer):
        raise ArmError(
            "The tokenizer has no chat template, and a prompt is a list of messages. Give the prompt as text, or a "
            "model folder whose tokenizer has a chat template (tokenizer.chat_template = ..., then save_pretrained)."
        )
    try:
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ArmError(
            f"The chat template refuses the messages {prompt!r:.200}: {error}. Remove what it refuses (often a system "
            "message; where = 'before' puts an instruction into the user's message)."
        ) from error


def _as_text(index: int, row: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    """A row with its conversations as text; the answer to a prompt continues where the prompt ends."""
    texts = {}
    for column in columns:
        turns = [_turn(index, column, message) for message in row[column]]
        if column == "prompt":
            texts[column] = "\n".join([*turns, "Answer:"])
        elif column in _ANSWERS and "prompt" in row:
            texts[column] = "\n".join(turns).removeprefix("Answer:")
        else:
            texts["text" if column == "messages" else column] = "\n".join(turns)
    return {name: value for name, value in row.items() if name not in columns} | texts


def _turn(index: int, column: str, message: Any) -> str:
    role, content = message.get("role"), message.get("content")
    if not isinstance(content, str) or role not in (*_SPEAKERS, "system"):
        raise ArmError(
            f"Row {index}: {column!r} has the message {message!r:.80}, which cannot be read as plain text. Without a "
            "chat template, messages must be texts of the system, the user or the assistant."
        )
    return f"{_SPEAKERS.get(role, '')}{content}"
