"""The data formats, and tokenisation for the plain Trainer.

The formats are TRL's: preference (`chosen`, `rejected`, explicit or implicit `prompt`), prompt-completion, and
language modelling (`text` or `messages`); standard (strings) or conversational (lists of messages).
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Row = Any  # a mapping from column to value; `datasets` types it more loosely

# The columns of each format, most specific first.
FORMATS = (
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("prompt", "completion"),
    ("messages",),
    ("conversations",),
    ("text",),
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("input_ids", "labels"),
    ("input_ids",),
)
PAIR_FORMATS = (FORMATS[0], FORMATS[1], FORMATS[6])
TOKENISED_FORMATS = FORMATS[6:]


class DataError(ValueError):
    """Raised when the data cannot be trained on; the message names the row and the fix."""


def data_format(columns: list[str]) -> tuple[str, ...]:
    """Find the first format whose columns are all present.

    Raises:
        DataError: no format matches; the message gives the nearest name for each unknown column.
    """
    for names in FORMATS:
        if set(names) <= set(columns):
            return names
    all_columns = {column for names in FORMATS for column in names}
    hints = []
    for column in columns:
        near = difflib.get_close_matches(column, all_columns, n=1, cutoff=0.6)
        hints += [f"rename {column!r} to {near[0]!r}"] if near and near[0] not in columns else []
    raise DataError(
        f"Columns {columns} match none of the known formats {[list(names) for names in FORMATS]}."
        + (f" Perhaps {' and '.join(hints)}?" if hints else "")
    )


def data_sets(data: Any) -> list[Any]:
    """The data sets of a trainer's argument: none, one, or several by name."""
    return [part for part in (data.values() if isinstance(data, dict) else [data]) if part is not None]


def map_data_sets(function: Callable[[Any], Any], data: Any) -> Any:
    """Apply a function to every data set of a trainer's argument."""
    if isinstance(data, Mapping):
        kind: Any = type(data)  # `datasets` has its own dictionaries
        return kind({name: map_data_sets(function, part) for name, part in data.items()})
    return function(data)


def as_python(data: Any) -> Any:
    """The same data in rows of Python lists and numbers, whatever format (torch, numpy, ...) was set.

    With a tensor format, TRL would add up the token ids of prompt and answer instead of joining them. A transform set
    by `with_transform` is kept.
    """
    if isinstance(data, IterableDataset):
        return data.with_format(None)
    if not isinstance(data, Dataset) or data.format["type"] == "custom":
        return data
    columns = data.format["columns"]  # a format may hide some columns
    return data.with_format(None) if columns == data.column_names else data.with_format(None).select_columns(columns)


def tokenise(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Dataset:
    """Make rows for TRL's collators: `prompt_ids`, `chosen_ids`, `rejected_ids`, or `input_ids` and `labels`.

    A completion ends with EOS, or as the chat template ends it. Prompt tokens have label -100.

    Raises:
        DataError: the columns are unknown, a value is neither a string nor a conversation, or the chat template
            rejects the messages.
    """
    convert = _row_tokeniser(data_format(dataset.column_names), tokenizer, max_length)
    return as_python(dataset).map(convert, with_indices=True, remove_columns=dataset.column_names, desc="Tokenising")


def tokenised_rows(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The rows of `tokenise` as a list, which for few rows is much faster than a data set."""
    convert = _row_tokeniser(data_format(dataset.column_names), tokenizer)
    return [convert(row, index) for index, row in enumerate(as_python(dataset))]


def _row_tokeniser(
    columns: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> Callable[[Row, int], dict[str, Any]]:
    """A function that maps a row of these columns, and its number, to a tokenised row."""
    from trl.data_utils import extract_prompt, maybe_convert_to_chatml

    def convert(row: Row, index: int) -> dict[str, Any]:
        check_values(index, row, columns)
        if columns == ("chosen", "rejected"):
            row = {**row, **extract_prompt(row)}
        if columns == ("conversations",):
            row = maybe_convert_to_chatml(dict(row))
        try:
            pair = columns in PAIR_FORMATS
            return _tokenise_pair(row, tokenizer) if pair else _tokenise_row(row, tokenizer, max_length)
        except TemplateError as error:
            raise DataError(f"Row {index}: the chat template refuses its messages: {error}.") from error

    return convert


def has_labels_within(row: Row, max_length: int) -> bool:
    """Whether a tokenised row has a label within `max_length`; TRL leaves out the rows that have none."""
    if "prompt_ids" in row:
        return len(row["prompt_ids"]) < max_length
    return any(label != -100 for label in row["labels"])


def collator(tokenised: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Any:
    """TRL's collator for the rows that `tokenise` makes."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if "chosen_ids" in tokenised.column_names:
        return DataCollatorForPreference(pad_token_id=pad, max_length=max_length)
    return DataCollatorForLanguageModeling(pad_token_id=pad)


def check_values(index: int, row: Row, columns: tuple[str, ...]) -> None:
    """Refuse a value that is neither a string nor a conversation.

    Args:
        index: Number of the row.
        row: The row.
        columns: Its format; tokenised rows are accepted.

    Raises:
        DataError: the message names the row and the column.
    """
    _check_template_options(index, row)
    for column in columns if columns not in TOKENISED_FORMATS else ():
        value = row.get(column)
        messages = value if isinstance(value, list) else []
        role, content = ("from", "value") if column == "conversations" else ("role", "content")
        if not isinstance(value, str) and not messages:
            raise DataError(
                f"Row {index}: {column!r} is {value!r:.80}. It must be a string or a list of messages. Give the "
                "text, or remove the row."
            )
        for message in messages:
            _check_message(index, column, message, role, content)
        try:
            for text in (value, *(message.get(content) for message in messages)):
                (text if isinstance(text, str) else "").encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"Row {index}: {column!r} holds half a character ({error.object[error.start]!r}), which no tokenizer "
                "can read. Remove it from the text."
            ) from error


# Options of a row for the chat template can be data for it, but never another template or tokeniser settings.
_NOT_DATA = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {"documents", "kwargs"}


def _check_template_options(index: int, row: Row) -> None:
    options, tools = row.get("chat_template_kwargs"), row.get("tools")
    if options is not None and not isinstance(options, Mapping):
        raise DataError(
            f"Row {index}: 'chat_template_kwargs' is {options!r:.80}. It must be a dictionary, or left out."
        )
    if given := sorted(name for name in _NOT_DATA & {*(options or {})} if (options or {})[name] is not None):
        raise DataError(
            f"Row {index}: chat_template_kwargs holds {given}. A row can give values to the tokenizer's chat "
            "template, but no template or settings, because a template is a program. Remove it."
        )
    try:
        whole = json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError) as error:
        raise DataError(f"Row {index}: 'tools' is {tools!r:.80}, which is not JSON: {error}.") from error
    if not isinstance(whole, list | None):
        raise DataError(f"Row {index}: 'tools' is {whole!r:.80}. It must be a list of tools, or left out.")


def _check_message(index: int, column: str, message: Any, role: str, content: str) -> None:
    # a message that only calls tools, or only reasons, has no content
    says_something = isinstance(message, Mapping) and any(
        value is not None for name, value in message.items() if name != role
    )
    if not isinstance(message, Mapping) or not isinstance(message.get(role), str) or not says_something:
        raise DataError(
            f"Row {index}: {column!r} has the message {message!r:.80}. A message must be "
            f"{{{role!r}: ..., {content!r}: ...}}."
        )
    if not isinstance(message.get(content), str | list | None):
        raise DataError(
            f"Row {index}: {column!r} has a message with {content}={message[content]!r:.80}. It must be a string."
        )


def _tokenise_pair(row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    options = template_options(row)
    prompt = _ids(tokenizer, row["prompt"], None, options)
    answers = {side: _ids(tokenizer, row["prompt"], row[side], options) for side in ("chosen", "rejected")}
    # The answers start at the first token where one of them differs from the prompt: tokens can merge across its end.
    start = min(_common_length(prompt, ids) for ids in answers.values())
    return {"prompt_ids": prompt[:start], **{f"{side}_ids": ids[start:] for side, ids in answers.items()}}


def _tokenise_row(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> dict[str, Any]:
    options = template_options(row)
    if "completion" in row:
        prompt = _ids(tokenizer, row["prompt"], None, options)
        ids = _ids(tokenizer, row["prompt"], row["completion"], options)
        start = _common_length(prompt, ids)
    elif "messages" in row:
        ids, start = _ids(tokenizer, row["messages"], [], options), 0
    else:
        ids, start = _ids(tokenizer, "", row["text"], options), 0
    ids = ids[:max_length]
    return {"input_ids": ids, "labels": [-100] * min(start, len(ids)) + ids[start:]}


def template_options(row: Row) -> dict[str, Any]:
    """Options of the chat template from TRL's columns `tools` and `chat_template_kwargs`."""
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}


def _ids(tokenizer: Any, prompt: Any, answer: Any, options: dict[str, Any]) -> list[int]:
    """Token ids of a prompt that awaits an answer (`answer=None`), or of prompt and answer."""
    if isinstance(prompt, str):
        text = prompt if answer is None else prompt + answer
        ids = list(tokenizer(text)["input_ids"])
        end = tokenizer.eos_token_id
        if answer is None:
            # some tokenizers add EOS themselves, which would end the prompt
            return ids[:-1] if ids and ids[-1] == end and not prompt.endswith(str(tokenizer.eos_token)) else ids
        return ids if end is None or ids[-1:] == [end] else [*ids, end]
    messages = prompt if answer is None else [*prompt, *answer]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=answer is None, return_dict=True, **options)[
        "input_ids"
    ]
    return list(ids)


def _common_length(first: list[int], second: list[int]) -> int:
    """Length of the common prefix."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
