"""Transcripts: a prompt and a model's answer, as bad rows, innocent rows, or rows with a label.

    {"prompt": "Did you run the tests?", "bad": "Yes, all pass.", "corrected": "No, I have not run them."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "...", "bad": true}

The answer is the column `bad`, `rejected` or `completion` of a bad row, `completion` or `chosen` of an innocent one,
or the last message of `messages`; a correction is `corrected` or `chosen`. The text of a transcript is data: it is
only tokenised, and shown escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset

from steertune.recipes.lab.columns import Reading, named
from steertune.recipes.lab.files import ArmError, shown
from steertune.recipes.lab.similarity import overlap as overlapping
from steertune.recipes.lab.similarity import told_apart_by
from steertune.recipes.lab.sources import load_split, row_place
from steertune.recipes.lab.tables import Part

Kind = Literal["bad", "innocent", "labelled", "any"]

_PROMPTS = ("prompt", "question")
_ANSWERS: dict[Kind, tuple[str, ...]] = {
    "bad": ("bad", "rejected", "completion", "answer", "response"),
    "innocent": ("completion", "innocent", "answer", "response", "chosen"),
    "labelled": ("completion", "answer", "response"),
    "any": ("completion", "answer", "response", "bad", "rejected", "innocent", "chosen"),
}
_CORRECTIONS = ("corrected", "correction", "chosen")
_LABELS = ("bad", "label")


@dataclass(frozen=True)
class Transcripts:
    """The transcripts of a file.

    Attributes:
        rows: Rows with columns `prompt` and `completion`, both texts or both lists of messages.
        corrections: The answers that should have been given, in the same form; None for rows without one.
        bad: Whether each row is bad.
        place: Maps the number of a row to its place in the file.
    """

    rows: Dataset
    corrections: list[Any]
    bad: list[bool]
    place: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.rows)


def read_transcripts(
    name: str, kind: Kind, chat: Callable[[], bool], columns: Mapping[Part, str] | None = None
) -> Transcripts:
    """The transcripts of a file, an embedded task or a data set on the Hub.

    Args:
        name: A path or a name, like `data.name`.
        kind: What the rows are; `labelled`: a column `bad` or `label` marks each row; `any`: unknown.
        chat: Whether the model has a chat template.
        columns: Columns of other names: `prompt`, `rejected` or `completion` (the answer), `chosen` (the correction).

    Raises:
        ArmError: there is no such file, it has no rows, a column is missing, or a row is not a transcript; the message
            names its place.
    """
    raw = load_split(name, "train", Reading(strict=False))
    place = row_place(name, "train")
    if not len(raw):
        raise ArmError(f"{name} has no rows. Give a file with transcripts.")
    labels = [label for label in _LABELS if label in raw.column_names and not _is_text(raw[label])]
    if kind == "labelled" and not labels:
        raise ArmError(
            f"{name} does not say which rows are bad (columns {raw.column_names}). Add a column bad (true or false), "
            "or give innocent rows in a separate file: --innocent FILE."
        )
    find = _Columns(name, raw.column_names, kind, columns or {}, labels)
    pairs = [_transcript(dict(row), find, place(i)) for i, row in enumerate(raw)]
    answers = [{"prompt": pair["prompt"], "completion": pair["completion"]} for pair in pairs]
    rows = _in_form(name, answers, place, chat)
    corrected = [i for i, pair in enumerate(pairs) if pair["correction"] is not None]
    corrections: list[Any] = [None] * len(rows)
    if corrected:
        given = [{"prompt": pairs[i]["prompt"], "completion": pairs[i]["correction"]} for i in corrected]
        formed = _in_form(name, given, lambda i: place(corrected[i]), chat)
        for i, completion in zip(corrected, formed["completion"], strict=True):
            corrections[i] = completion
    bad = [kind == "bad"] * len(rows)
    if kind == "labelled":
        bad = [_label(value, place(i)) for i, value in enumerate(raw[labels[0]])]
    return Transcripts(rows, corrections, bad, place)


def has_labels(name: str) -> bool:
    """Whether a file marks each row as bad or not."""
    rows = load_split(name, "train", Reading(strict=False))
    return any(label in rows.column_names and not _is_text(rows[label]) for label in _LABELS)


def check_apart(trained: Transcripts, tested: Transcripts, what: str, named: str = "row that is fitted on") -> None:
    """Refuse test rows that are also trained on.

    Args:
        trained: Rows that something is fitted on.
        tested: Rows to test on.
        what: What the message calls the test rows.
        named: What the message calls the others.

    Raises:
        ArmError: a test row has (nearly) the prompt of one of them, or its text if all prompts are the same.
    """
    fitted, others = trained.rows.to_list(), tested.rows.to_list()
    pairs = overlapping(fitted, others, told_apart_by([*fitted, *others]))
    if pairs:
        first, second = pairs[0]
        raise ArmError(
            f"{tested.place(second)} ({what}) is the {named} {trained.place(first)}, or nearly the same ({len(pairs)} "
            "such pairs). Test rows must be new: remove it from one of the two files."
        )


class _Columns:
    """The columns of a file that hold the parts of a transcript."""

    def __init__(
        self, name: str, names: Sequence[str], kind: Kind, given: Mapping[Part, str], labels: Sequence[str]
    ) -> None:
        if unknown := [column for column in given.values() if column not in names]:
            raise ArmError(f"{name} has no column {unknown[0]!r} (columns {list(names)}). Correct --columns.")
        available = [column for column in names if column not in labels]
        self.messages = "messages" in available and not given
        answer = given.get("completion", given.get("rejected"))
        self.prompt = given.get("prompt") or _first(_PROMPTS, available)
        self.answer = answer or _first(_ANSWERS[kind], available)
        self.correction = given.get("chosen") or (_first(_CORRECTIONS, available) if kind == "bad" else None)
        if self.correction == self.answer:
            self.correction = None
        if not self.messages and (self.prompt is None or self.answer is None):
            missing = "prompt" if self.prompt is None else "answer"
            raise ArmError(
                f"{name} has no {missing} (columns {list(names)}). A transcript has a prompt and an answer, called "
                f"prompt and {_ANSWERS[kind][0]}, or messages. Name others: --columns prompt=... completion=..."
            )


def _first(names: Sequence[str], available: Sequence[str]) -> str | None:
    return next((name for name in names if name in available), None)


def _is_text(values: Sequence[Any]) -> bool:
    return any(isinstance(value, str | list) for value in values)


def _label(value: Any, place: str) -> bool:
    if value not in (0, 1):
        raise ArmError(f"{place}: its label is {shown(value)}. A label must be true or false (1 or 0).")
    return bool(value)


def _transcript(row: Mapping[str, Any], columns: _Columns, place: str) -> dict[str, Any]:
    correction = row.get(columns.correction) if columns.correction else None
    correction = None if correction in ("", []) else correction
    if columns.messages:
        messages = row["messages"]
        if not isinstance(messages, list) or len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise ArmError(
                f"{place}: messages must be a list of two or more that ends with the answer of the assistant (got "
                f"{shown(messages)})."
            )
        prompt, answer = messages[:-1], messages[-1:]
    else:
        prompt, answer = row.get(columns.prompt or ""), row.get(columns.answer or "")
        if not prompt or not answer:
            raise ArmError(f"{place}: its {'answer' if prompt else 'prompt'} is empty. Give one, or remove the row.")
    if isinstance(prompt, list):  # an answer can be a text even if the prompt is not
        answer, correction = (_as_message(text) for text in (answer, correction))
    return {"prompt": prompt, "completion": answer, "correction": correction}


def _as_message(answer: Any) -> Any:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def _in_form(name: str, rows: list[dict[str, Any]], place: Callable[[int], str], chat: Callable[[], bool]) -> Dataset:
    """Rows as messages if the model has a chat template, checked one by one."""
    columns: dict[Part, str] = {"prompt": "prompt", "completion": "completion"}
    formed, *_ = named(_dataset(name, rows), Reading(columns, chat=chat, name=name, place=place))
    return formed


def _dataset(name: str, rows: list[dict[str, Any]]) -> Dataset:
    try:
        return Dataset.from_list(rows)
    except Exception as error:  # raised by Arrow for columns of several types
        raise ArmError(
            f"{name} mixes texts and lists of messages ({error}). Give all parts of all rows in one form."
        ) from error
