"""Check a data set before anything is trained on it, and tokenise it for the plain Trainer.

The formats are TRL's: preference (`chosen`, `rejected`, explicit or implicit `prompt`), prompt-completion, and
language modelling (`text` or `messages`); standard (strings) or conversational (lists of messages).
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

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
    """The data cannot be trained on; the message names the row and the fix."""


def data_format(columns: list[str]) -> tuple[str, ...]:
    """The format whose columns are all there.

    Raises:
        DataError: none fits; the message names the nearest column for each missing one.
    """
    for wanted in FORMATS:
        if set(wanted) <= set(columns):
            return wanted
    hints = []
    for column in columns:
        near = difflib.get_close_matches(column, {c for wanted in FORMATS for c in wanted}, n=1, cutoff=0.6)
        hints += [f"rename {column!r} to {near[0]!r}"] if near and near[0] not in columns else []
    raise DataError(
        f"Columns {columns} are none of the known formats {[list(f) for f in FORMATS]}."
        + (f" Perhaps {' and '.join(hints)}?" if hints else "")
    )


def as_python(data: Any) -> Any:
    """The same data, whose rows hold Python's own lists and numbers, whatever format (torch, numpy, ...) was set.

    A format of TRL's DPO rows would add up the tokens of prompt and answer where it puts one behind the other. What
    `with_transform` makes of rows is left alone.
    """
    if isinstance(data, Mapping):
        kind: Any = type(data)  # of `datasets` too
        return kind({name: as_python(part) for name, part in data.items()})
    if isinstance(data, IterableDataset):
        return data.with_format(None)
    if not isinstance(data, Dataset) or data.format["type"] == "custom":
        return data
    columns = data.format["columns"]  # a format may hide the others
    return data.with_format(None) if columns == data.column_names else data.with_format(None).select_columns(columns)


def check_rows(
    dataset: Any, tokenizer: PreTrainedTokenizerBase | None, text_column: str | None = None
) -> tuple[str, ...]:
    """Refuse a data set that cannot be trained on, before tokenising; return its format.

    `text_column` is a further name for the column `text`.

    Raises:
        DataError: no rows, an unknown column, a value that is no text or conversation, an empty answer, chosen equal
            to rejected, or conversations for a tokenizer without a chat template.
    """
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise DataError("The data set is empty: there is nothing to train on.")
    rows = dataset if isinstance(dataset, Dataset) else _first(dataset)
    wanted: tuple[str, ...] = ()
    for index, row in enumerate(rows):
        if index == 0:
            wanted = (text_column,) if text_column and text_column in row else data_format(list(row))
            _check_template(row, wanted, tokenizer)
        _check_values(index, row, wanted)
        _check_answers(index, row)
    return wanted


def check_tokens(
    before: Any,
    after: Any,
    max_length: int | None,
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int | None = None,
    packed: bool = False,
) -> None:
    """Refuse what only shows after tokenising.

    Args:
        before: The data as they were given.
        after: The same, tokenised.
        max_length: Where rows are cut.
        tokenizer: Whose BOS is looked for.
        vocabulary: How many tokens the model knows; None: not checked.
        packed: Whether one row holds several of the rows that were given.

    Raises:
        DataError: no row with a token to predict, rows that were dropped or have no label left because the prompt
            fills `max_length`, an answer without tokens, chosen and rejected with the same tokens, a token that the
            model does not have, or two BOS tokens in front.
    """
    if not isinstance(after, Dataset):
        return
    if isinstance(before, Dataset) and len(after) < len(before) and not packed:
        raise DataError(
            f"{len(before) - len(after)} of {len(before)} rows have no label left: their prompt fills max_length="
            f"{max_length} tokens. Raise max_length or shorten the prompts."
        )
    bos = getattr(tokenizer, "bos_token_id", None)
    columns = [column for column in after.column_names if column.endswith("_ids") or column == "labels"]
    predicted = not {"labels", "input_ids"} & {*columns}  # pairs are checked row by row
    for index, row in enumerate(as_python(after.select_columns(columns))):
        row = dict(row)
        labels = row.get("labels", row.get("input_ids"))
        # a classifier has one label a row
        predicted = predicted or not isinstance(labels, list) or any(label != -100 for label in labels[1:])
        _check_ids(index, row, vocabulary)
        if "chosen_ids" in row:
            if row["chosen_ids"] == row["rejected_ids"]:
                raise DataError(
                    f"Row {index}: chosen and rejected have the same tokens; the pair carries no contrast."
                )
            if not row["chosen_ids"] or not row["rejected_ids"]:
                raise DataError(f"Row {index}: an answer has no tokens of its own.")
            if max_length is not None and len(row["prompt_ids"]) >= max_length:
                raise DataError(
                    f"Row {index}: the prompt has {len(row['prompt_ids'])} tokens and fills max_length={max_length}."
                )
        elif isinstance(row.get("labels"), list) and all(label == -100 for label in row["labels"]):
            raise DataError(f"Row {index}: no label is left within max_length={max_length} tokens.")
        ids = row.get("prompt_ids") or row.get("input_ids") or []
        if bos is not None and list(ids[:2]) == [bos, bos]:
            raise DataError(
                f"Row {index} starts with two BOS tokens: the text already holds one. Remove it from the text."
            )
    if len(after) and not predicted:
        raise DataError("No row has a token to predict: the texts are empty, or of one token. Give longer ones.")


def warn_cut(rows: Any, max_length: int | None, keeps_end: bool) -> None:
    """Say which part of pairs longer than `max_length` is dropped while they are collated.

    Args:
        rows: Tokenised rows; others than pairs are cut already.
        max_length: Where they are cut; None: nowhere.
        keeps_end: Whether the beginning goes, instead of the end.
    """
    if max_length is None or not isinstance(rows, Dataset) or "chosen_ids" not in rows.column_names:
        return
    rows = as_python(rows)
    columns = [rows[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    lengths = [len(prompt) + max(len(a), len(b)) for prompt, a, b in zip(*columns, strict=True)]
    if cut := sum(length > max_length for length in lengths):
        part = "the beginning of their prompts" if keeps_end else "the end of their answers"
        logger.warning(
            "%d of %d pairs are longer than max_length=%d (the longest: %d tokens): %s is dropped.",
            *(cut, len(lengths), max_length, max(lengths), part),
        )


def tokenise(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Dataset:
    """Rows for TRL's collators: `prompt_ids`, `chosen_ids`, `rejected_ids`, or `input_ids` and `labels`.

    A completion ends with EOS, or as the chat template ends it. Prompt tokens have label -100.

    Raises:
        DataError: unknown columns, or a value that is no text or conversation.
    """
    wanted, dataset = data_format(dataset.column_names), as_python(dataset)
    for index, row in enumerate(dataset):
        _check_values(index, row, wanted)
    if wanted == ("chosen", "rejected"):
        from trl.data_utils import extract_prompt

        dataset = dataset.map(extract_prompt)
    if wanted == ("conversations",):
        from trl.data_utils import maybe_convert_to_chatml

        dataset = dataset.map(maybe_convert_to_chatml, remove_columns="conversations")
    convert = _tokenise_pair if wanted in PAIR_FORMATS else _tokenise_row
    return dataset.map(
        lambda row: convert(row, tokenizer, max_length),
        remove_columns=dataset.column_names,
        desc="Tokenising",
    )


def collator(tokenised: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Any:
    """TRL's collator for rows that `tokenise` made."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if "chosen_ids" in tokenised.column_names:
        return DataCollatorForPreference(pad_token_id=pad, max_length=max_length)
    return DataCollatorForLanguageModeling(pad_token_id=pad)


def _tokenise_pair(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> dict[str, Any]:
    options = _template_options(row)
    prompt = _ids(tokenizer, row["prompt"], None, options)
    answers = {side: _ids(tokenizer, row["prompt"], row[side], options) for side in ("chosen", "rejected")}
    start = min(_common(prompt, ids) for ids in answers.values())
    return {"prompt_ids": prompt[:start], **{f"{side}_ids": ids[start:] for side, ids in answers.items()}}


def _tokenise_row(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> dict[str, Any]:
    options = _template_options(row)
    if "completion" in row:
        prompt = _ids(tokenizer, row["prompt"], None, options)
        ids = _ids(tokenizer, row["prompt"], row["completion"], options)
        start = _common(prompt, ids)
    elif "messages" in row:
        ids, start = _ids(tokenizer, row["messages"], [], options), 0
    else:
        ids, start = _ids(tokenizer, "", row["text"], options), 0
    ids = ids[:max_length]
    return {"input_ids": ids, "labels": [-100] * min(start, len(ids)) + ids[start:]}


def _template_options(row: Row) -> dict[str, Any]:
    """What a row says to its chat template: TRL's columns `tools` and `chat_template_kwargs`."""
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}


def _ids(tokenizer: Any, prompt: Any, answer: Any, options: dict[str, Any]) -> list[int]:
    """Token ids of a prompt that awaits an answer (`answer=None`), or of prompt and answer."""
    if isinstance(prompt, str):
        text = prompt if answer is None else prompt + answer
        ids = list(tokenizer(text)["input_ids"])
        end = tokenizer.eos_token_id
        if answer is None:
            return ids[:-1] if ids and ids[-1] == end and not prompt.endswith(str(tokenizer.eos_token)) else ids
        return ids if end is None or ids[-1:] == [end] else [*ids, end]
    messages = prompt if answer is None else [*prompt, *answer]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=answer is None, return_dict=True, **options)[
        "input_ids"
    ]
    return list(ids)


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common prefix (tokens may merge across the end of the prompt)."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _first(dataset: Any) -> Iterator[Row]:
    row = next(iter(dataset), None)
    if row is None:
        raise DataError("The data set is empty: there is nothing to train on.")
    return iter([row])


def _check_template(row: Row, wanted: tuple[str, ...], tokenizer: PreTrainedTokenizerBase | None) -> None:
    conversational = any(isinstance(row[c], list) and row[c] and isinstance(row[c][0], Mapping) for c in wanted)
    if conversational and tokenizer is not None and getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            "The data are conversations, and the tokenizer has no chat template. Set tokenizer.chat_template, or give "
            "plain strings."
        )


def _check_ids(index: int, row: Row, vocabulary: int | None) -> None:
    if vocabulary is None:
        return
    for column in (c for c in row if c.endswith("_ids")):
        ends = (min(row[column]), max(row[column])) if row[column] else ()
        if wrong := [end for end in ends if not 0 <= end < vocabulary]:
            raise DataError(
                f"Row {index}: {column} holds token {wrong[0]}, the model has {vocabulary}: 0 to {vocabulary - 1}. Is "
                "this its tokenizer? For added tokens call model.resize_token_embeddings(len(tokenizer))."
            )


def _check_values(index: int, row: Row, wanted: tuple[str, ...]) -> None:
    """Refuse what is neither text nor a conversation."""
    for column in wanted if wanted not in TOKENISED_FORMATS else ():
        value = row.get(column)
        messages = value if isinstance(value, list) else []
        speaker, said = ("from", "value") if column == "conversations" else ("role", "content")
        if not isinstance(value, str) and not messages:
            raise DataError(
                f"Row {index}: {column!r} is {value!r:.80}, a text or a list of messages is expected. Remove the "
                "row, or give the text."
            )
        for message in messages:
            # a message that calls tools, or that only reasons, says nothing
            speaks = isinstance(message, Mapping) and any(
                value is not None for name, value in message.items() if name != speaker
            )
            if not isinstance(message, Mapping) or not isinstance(message.get(speaker), str) or not speaks:
                raise DataError(
                    f"Row {index}: {column!r} has the message {message!r:.80}, {{{speaker!r}: ..., {said!r}: ...}} is "
                    "expected."
                )
            if not isinstance(message.get(said), str | list | None):
                raise DataError(
                    f"Row {index}: {column!r} has a message with {said}={message[said]!r:.80}, a text is expected."
                )
        try:
            for text in (value, *(message.get(said) for message in messages)):
                (text if isinstance(text, str) else "").encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"Row {index}: {column!r} holds half a character ({error.object[error.start]!r}), which no tokenizer "
                "reads. Remove it from the text."
            ) from error


def _check_answers(index: int, row: Row) -> None:
    for column in ("chosen", "rejected", "completion"):
        if column in row and not _text(row[column]).strip():
            raise DataError(f"Row {index}: {column!r} is empty, so it has no token to train on. Remove the row.")
    if "chosen" in row and "rejected" in row and row["chosen"] == row["rejected"]:
        raise DataError(f"Row {index}: chosen equals rejected; the pair carries no contrast. Remove the row.")


def _text(value: Any) -> str:
    if isinstance(value, list):
        # messages, or the parts of one message
        return "".join(_text(m.get("content") or m.get("text")) + str(m.get("tool_calls") or "") for m in value)
    return "" if value is None else str(value)
