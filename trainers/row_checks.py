"""Check the rows of a data set: once as they are given, and once as tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .data import TOKENISED_FORMATS, DataError, Row, as_python, check_values, data_format, template_options

logger = logging.getLogger(__name__)


def check_rows(
    dataset: Any, tokenizer: PreTrainedTokenizerBase | None, text_column: str | None = None
) -> tuple[str, ...]:
    """Refuse a data set that cannot be trained on, before it is tokenised; for a stream, check the first row.

    Args:
        dataset: The rows as they are given.
        tokenizer: The tokenizer whose chat template writes conversations; None: no template is needed here.
        text_column: Another name for the column `text`.

    Returns:
        The format of the rows.

    Raises:
        DataError: the data set is empty, a column is unknown, a value is neither a string nor a conversation, an
            answer is empty, chosen equals rejected, or the tokenizer has no chat template for conversations, or one
            that rejects them.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise DataError("The data set is empty. Give at least one row.")
    columns = (text_column,) if text_column and text_column in first else data_format(list(first))
    _check_template(first, columns, tokenizer)
    if columns in TOKENISED_FORMATS:
        return columns  # `check_tokenised` reads these rows
    for index, row in enumerate(dataset if isinstance(dataset, Dataset) else [first]):
        check_values(index, row, columns)
        _check_answers(index, row)
    if isinstance(tokenizer, PreTrainedTokenizerBase) and columns != ("conversations",):
        _check_first(first, columns, tokenizer)
    return columns


@dataclass(frozen=True)
class TokenLimits:
    """The limits of tokenised rows.

    Attributes:
        max_length: The length to which rows are truncated; None if they are not.
        keeps_end: Whether truncation drops the beginning of a row, instead of the end.
        bos: Id of the token that begins a text; None if the tokenizer has none.
        vocabulary: Size of the model's vocabulary; None if unknown.
        context: Context length of the model; None if unknown.
    """

    max_length: int | None = None
    keeps_end: bool = False
    bos: int | None = None
    vocabulary: int | None = None
    context: int | None = None

    @property
    def cut(self) -> str:
        """The length to which rows are truncated, in words."""
        whole = " (all that the model and its tokenizer read)" if self.max_length == self.context else ""
        return f"max_length={self.max_length}{whole}"


def check_tokenised(
    given: Any, rows: Any, limits: TokenLimits, packed: bool = False, evaluation: bool = False
) -> None:
    """Refuse tokenised rows that cannot be trained on, and warn of truncated rows, in one pass.

    Rows without a label add nothing to the loss, as with the parents: TRL drops them, `Trainer` counts none of their
    tokens.

    Args:
        given: The rows before tokenisation.
        rows: The tokenised rows.
        limits: See `TokenLimits`.
        packed: Whether one tokenised row holds several of the given rows.
        evaluation: Whether these are evaluation rows.

    Raises:
        DataError: no row has a token to predict; an answer has no tokens; chosen and rejected have the same tokens; a
            token is unknown to the model; a row begins with two BOS tokens, or is longer than the model's context and
            nothing cuts it.
    """
    if not isinstance(rows, Dataset):
        return
    columns = [column for column in rows.column_names if column.endswith("_ids") or column == "labels"]
    lengths, without_label, full = [], 0, 0  # of pairs; rows that are all prompt; rows that reach max_length
    predicts = not {"labels", "input_ids"} & {*columns}  # pairs are checked one by one
    for index, row in enumerate(as_python(rows.select_columns(columns))):
        _check_ids(index, row, limits)
        if "chosen_ids" in row:
            _check_pair(index, row)
            lengths.append(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])))
            if limits.max_length is None or limits.max_length > (limits.context or limits.max_length):
                _reaches_the_end(index, lengths[-1], limits)
            continue
        labels = row.get("labels", row.get("input_ids"))
        # a classifier has one label per row
        predicts = predicts or not isinstance(labels, list) or any(label != -100 for label in labels[1:])
        without_label += isinstance(labels, list) and all(label == -100 for label in labels)
        if not packed and "position_ids" not in row and isinstance(row.get("input_ids"), list):
            full += _reaches_the_end(index, len(row["input_ids"]), limits)
    dropped = len(given) - len(rows) if isinstance(given, Dataset) and not packed else 0
    if (len(given) if isinstance(given, Dataset) else len(rows)) and (not len(rows) or not predicts):
        raise DataError(_no_label_left(dropped, limits))
    _warn_of_cuts(dropped + without_label, dropped + len(rows), [] if evaluation else lengths, limits)
    if full and not evaluation:
        logger.warning("%d of %d rows fill %s: anything beyond is dropped.", full, len(rows), limits.cut)


def _reaches_the_end(index: int, tokens: int, limits: TokenLimits) -> bool:
    """Whether a row reaches `max_length`, to which longer ones were truncated.

    Raises:
        DataError: it is longer than the context.
    """
    if limits.context is not None and tokens > limits.context:
        raise DataError(
            f"Row {index} has {tokens} tokens, but the model reads only {limits.context}. Shorten the row, remove it, "
            f"or set max_length={limits.context}."
        )
    return limits.max_length is not None and tokens >= limits.max_length


def _no_label_left(dropped: int, limits: TokenLimits) -> str:
    if dropped and limits.max_length is not None:
        return f"No row has a label left: the prompts fill {limits.cut}. " + (
            "Shorten them." if limits.max_length == limits.context else "Raise max_length, or shorten them."
        )
    return "No row has a token to predict: the texts are empty, or have only one token. Give longer ones."


def _warn_of_cuts(without_label: int, rows: int, lengths: list[int], limits: TokenLimits) -> None:
    """Warn, in one line each, of rows that have no label, and of pairs that are truncated when they are collated."""
    if without_label:
        cause = "" if limits.max_length is None else f", because their prompts fill {limits.cut}"
        logger.warning("%d of %d rows have no label left%s: they add nothing to the loss.", without_label, rows, cause)
    limit = limits.max_length
    if limit is not None and (cut := sum(length > limit for length in lengths)):
        part = "the beginning of their prompts" if limits.keeps_end else "the end of their answers"
        logger.warning(
            "%d of %d pairs are longer than %s (the longest: %d tokens): %s is dropped.",
            *(cut, len(lengths), limits.cut, max(lengths), part),
        )


def _check_template(row: Row, columns: tuple[str, ...], tokenizer: PreTrainedTokenizerBase | None) -> None:
    conversational = any(isinstance(row[c], list) and row[c] and isinstance(row[c][0], Mapping) for c in columns)
    if conversational and isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.chat_template is None:
        raise DataError(
            "The data are conversations, but the tokenizer has no chat template. Set tokenizer.chat_template, or give "
            "plain strings."
        )


def _check_first(row: Row, columns: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse conversations that the chat template rejects, such as a system message that it does not support."""
    if not all(isinstance(row[column], list) for column in columns):
        return
    for column in columns:
        conversation = row[column] if column == "prompt" or "prompt" not in row else [*row["prompt"], *row[column]]
        try:
            tokenizer.apply_chat_template(conversation, tokenize=False, **template_options(row))
        except TemplateError as error:
            raise DataError(
                f"Row 0: the chat template refuses its messages: {error}. Change the messages, or the template."
            ) from error


def _check_answers(index: int, row: Row) -> None:
    for column in ("chosen", "rejected", "completion"):
        if column in row and not _text_of(row[column]).strip():
            raise DataError(f"Row {index}: {column!r} is empty, so it has no token to train on. Remove the row.")
    if "chosen" in row and "rejected" in row and row["chosen"] == row["rejected"]:
        raise DataError(f"Row {index}: chosen equals rejected; the pair carries no contrast. Remove the row.")


def _check_ids(index: int, row: Row, limits: TokenLimits) -> None:
    size = limits.vocabulary
    for column, ids in row.items():
        if column == "labels":  # -100 is not a token, and neither is the label of a classifier's row
            ids = [label for label in ids if label != -100] if isinstance(ids, list) else []
        if size is None or not ids:
            continue
        if unknown := [end for end in (min(ids), max(ids)) if not 0 <= end < size]:
            raise DataError(
                f"Row {index}: {column} holds token {unknown[0]}, but the model has {size}: 0 to {size - 1}. Is this "
                "its tokenizer? For added tokens call model.resize_token_embeddings(len(tokenizer))."
            )
    ids = row.get("prompt_ids") or row.get("input_ids") or []
    if limits.bos is not None and list(ids[:2]) == [limits.bos, limits.bos]:
        raise DataError(
            f"Row {index} starts with two BOS tokens: the text already holds one. Remove it from the text."
        )


def _check_pair(index: int, row: Row) -> None:
    if row["chosen_ids"] == row["rejected_ids"]:
        raise DataError(f"Row {index}: chosen and rejected have the same tokens; the pair carries no contrast.")
    if not row["chosen_ids"] or not row["rejected_ids"]:
        raise DataError(f"Row {index}: an answer has no tokens beyond the prompt.")


def _text_of(value: Any) -> str:
    """All text of a value: of messages, or of the parts of one message."""
    if isinstance(value, list):
        return "".join(_text_of(m.get("content") or m.get("text")) + str(m.get("tool_calls") or "") for m in value)
    return "" if value is None else str(value)
