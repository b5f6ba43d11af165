"""The columns of a data set as the trainers name them: `prompt`, `chosen`, `rejected`, `completion`.

Columns of other tools are recognised, any others are named in `data.columns`:

    question, answer_matching_behavior, answer_not_matching_behavior   CAA, Anthropic's model-written evals
    positive, negative                                                 repeng
    positive_str, negative_str                                         steering-vectors

The pairs of repeng and steering-vectors are two whole texts. Their common beginning, up to a whole word, becomes the
prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import Any, Literal

from datasets import Dataset

from steertune.recipes.lab.column_names import as_options, like, suggested
from steertune.recipes.lab.files import ArmError, nearest, shown
from steertune.recipes.lab.forms import ROLES
from steertune.recipes.lab.progress import say
from steertune.recipes.lab.tables import Columns, Part
from steertune.trainers import DataError
from steertune.trainers.data import FORMATS, PAIR_FORMATS, TOKENISED_FORMATS
from steertune.trainers.row_checks import check_rows

Form = Literal["auto", "conversation", "text"]

NEIGHBOURS: tuple[dict[Part, str], ...] = (
    {"prompt": "question", "chosen": "answer_matching_behavior", "rejected": "answer_not_matching_behavior"},
    {"prompt": "question", "chosen": "chosen", "rejected": "rejected"},
    {"prompt": "prompt", "chosen": "positive", "rejected": "negative"},
    {"chosen": "positive", "rejected": "negative"},
    {"chosen": "positive_str", "rejected": "negative_str"},
    {"chosen": "positive_prompt", "rejected": "negative_prompt"},
)
"""Column names of other tools; the first match counts."""
_ANSWERERS = ("assistant", "model")
_FEW = 0.02  # of the pairs may have equal answers
_ROLES: dict[Part, str] = {"prompt": "user", "chosen": "assistant", "rejected": "assistant", "completion": "assistant"}


@dataclass(frozen=True)
class Reading:
    """How the rows of a data set are read.

    Attributes:
        columns: What each part of an example is; empty: the columns are recognised.
        form: What texts become: messages, plain text, or (`auto`) what the model reads.
        chat: Whether the model has a chat template; called only if `form` is `auto` and it matters.
        strict: Whether rows are refused that are not examples.
        answers: Whether an example needs answers; otherwise a prompt is enough.
        name: As in `data.name`, and
        place: from the number of a row to its place, both for messages.
    """

    columns: Columns = field(default_factory=dict)
    form: Form = "auto"
    chat: Callable[[], bool] = lambda: True
    strict: bool = True
    answers: bool = True
    name: str = ""
    place: Callable[[int], str] = str


def named(rows: Dataset, source: Reading) -> tuple[Dataset, bool, list[int]]:
    """Rows with the columns that the trainers expect, checked one by one.

    Returns:
        The rows, whether the data have prompts of their own, and which rows of the data these are.

    Raises:
        ArmError: a column is missing, or a row is not an example; the message names its place in the file.
    """
    columns = source.columns or _recognised(rows.column_names)
    if source.columns:
        columns = _complete(rows.column_names, source)
    elif source.strict and not columns:
        _check_names(rows.column_names, source)
        _check_wanted(rows, source)
    if columns:
        examples = [_example(dict(row), columns) for row in rows]
        own_prompts = "prompt" in columns
        if not own_prompts:
            examples = [_split(example) for example in examples]
        elif _has_texts(examples) and source.form != "text" and (source.form == "conversation" or source.chat()):
            examples = [_as_messages(example) for example in examples]
        elif _has_texts(examples):
            examples = [_as_one_text(example) for example in examples]
        rows = Dataset.from_list(examples)
    else:
        own_prompts = "prompt" in rows.column_names or not {"chosen", "rejected"} <= set(rows.column_names)
        rows = _in_form(rows, source)
    kept = _contrasting(rows, source) if source.strict else [*range(len(rows))]
    if len(kept) < len(rows):
        rows, place = rows.select(kept), source.place
        source = replace(source, place=lambda index: place(kept[index]))
    if source.strict:
        _check(rows, source)
    return rows, own_prompts, kept


def _contrasting(rows: Dataset, source: Reading) -> list[int]:
    """The rows without the few pairs whose answers are the same: they teach nothing, and large data sets have some.

    More than a few are a mistake, which the check names.
    """
    if not {"chosen", "rejected"} <= {*rows.column_names}:
        return [*range(len(rows))]
    equal = [i for i, (chosen, rejected) in enumerate(zip(rows["chosen"], rows["rejected"], strict=True))
             if chosen == rejected]  # fmt: skip
    if not equal or len(equal) > _FEW * len(rows):
        return [*range(len(rows))]
    left_out = f"{len(equal)} of {len(rows)} rows of {source.name} are left out"
    say(f"Warning: {left_out}: both of their answers are the same. The first is {source.place(equal[0])}.")
    return sorted({*range(len(rows))} - {*equal})


def _recognised(names: Sequence[str]) -> dict[Part, str]:
    """The columns for each part, if the columns are those of another tool; empty if they are the trainers' own or
    unknown."""
    for columns in NEIGHBOURS:
        if set(columns.values()) <= set(names) and "prompt" not in set(names) - set(columns.values()):
            return columns
    return {}


def _check_names(names: Sequence[str], source: Reading) -> None:
    """Refuse rows that have no columns of an example, or seem to have them under another name."""
    if any(set(columns) <= set(names) for columns in TOKENISED_FORMATS):
        raise ArmError(
            f"{source.name!r} holds token ids (columns {list(names)}), and recipes read texts and messages. Give the "
            "texts, or train in Python: the trainers read tokenised rows."
        )
    enough = not source.answers and "prompt" in names
    if not enough and not any(set(columns) <= set(names) for columns in FORMATS):
        raise ArmError(
            f"{source.name!r} does not have the columns of an example (got {list(names)}). Examples have prompt, "
            "chosen and rejected, or prompt and completion. Rename the columns, or name them: "
            f"{as_options(suggested(names))}."
        )
    others = [name for name in names if name not in ("chosen", "rejected")]
    if len(others) == len(names) - 2 and "prompt" not in names and (odd := like("prompt", others)):
        columns: Columns = {"prompt": odd[0], "chosen": "chosen", "rejected": "rejected"}
        raise ArmError(
            f"{source.name!r} has the columns chosen and rejected, no prompt, and {odd[0]!r}. If that is the prompt, "
            f"name it: {as_options(columns)}. Else remove the column."
        )


def _check_wanted(rows: Dataset, source: Reading) -> None:
    """Refuse answers that a column `label` calls unwanted, as in KTO's data: an answer without a pair is learned."""
    if not {"completion", "label"} <= set(rows.column_names) or "chosen" in rows.column_names:
        return
    unwanted = [index for index, label in enumerate(rows["label"]) if label is False]
    if unwanted:
        raise ArmError(
            f"{source.place(unwanted[0])}: its label is false ({len(unwanted)} of {len(rows)} rows), and completions "
            "without a rejected answer are learned. Remove these rows, or make pairs with the columns chosen and "
            "rejected."
        )


def _complete(names: Sequence[str], source: Reading) -> Columns:
    """`data.columns`, checked, with the parts whose columns have their own names."""
    where = f"{source.name!r}: columns {dict(source.columns)} cannot be filled in"
    for part, text in source.columns.items():
        try:
            # with a conversion or a format, a field is not the name of a column
            fields = {
                f"{name}{spec or kind or ''}" for _, name, spec, kind in Formatter().parse(text) if name is not None
            }
        except ValueError as error:
            raise ArmError(f"{where} ({error}). Its rows have {list(names)}.") from error
        if unknown := sorted(fields - set(names)):  # nor is an attribute of a column
            raise ArmError(f"{where} ({unknown}). Its rows have {list(names)}.")
        # a text without a column is the same in every row: right for an instruction, and else a misspelling
        if not fields and text not in names and not (part == "prompt" and " " in text.strip()):
            raise ArmError(f"{where} ({part}={text!r}). Its rows have {list(names)}.{nearest(text, list(names))}")
    by_name: dict[Part, str] = {part: part for part in _ROLES if part in names and part not in source.columns}
    if "completion" in source.columns:
        by_name = {part: name for part, name in by_name.items() if part == "prompt"}
    columns: dict[Part, str] = {**by_name, **source.columns}
    if not ({"chosen", "rejected"} <= columns.keys() or {"prompt", "completion"} <= columns.keys()):
        whole: dict[Part, str] = {**suggested(names), **columns}
        raise ArmError(
            f"{where}: an example has chosen and rejected, or prompt and completion. Its rows have {list(names)}. "
            f"Name all parts: {as_options(whole)}."
        )
    return columns


def _example(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """The parts of an example from a row's columns; of a list of texts the first one is taken."""
    row = {name: v[0] if isinstance(v, list) and v and isinstance(v[0], str) else v for name, v in row.items()}
    gaps = {part for part, text in columns.items() if any(v is None and f"{{{k}}}" in text for k, v in row.items())}
    return {
        part: row[text] if text in row else None if part in gaps else text.format_map(row)
        for part, text in columns.items()
    }


def _has_texts(examples: Sequence[dict[str, Any]]) -> bool:
    return all(isinstance(value, str) for example in examples for value in example.values())


def _split(example: dict[str, Any]) -> dict[str, Any]:
    """Two whole texts as their common beginning, the prompt, and two answers."""
    chosen, rejected = example["chosen"], example["rejected"]
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return example
    same = [a == b for a, b in zip(chosen, rejected, strict=False)]
    shared = "" if chosen == rejected else chosen[: [*same, False].index(False)]
    # the prompt ends before a space or after a punctuation mark, where tokens end too, and no answer is empty
    for end in range(min(len(shared), len(chosen) - 1, len(rejected) - 1), 0, -1):
        before = shared[end - 1]
        if chosen[end] == rejected[end] == " " or not (before.isalnum() or before in " '’-_"):
            return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}
    return {"prompt": "", **example}


def _as_messages(example: dict[str, Any]) -> dict[str, Any]:
    return {
        part: [{"role": _ROLES[part], "content": text.strip() if part != "prompt" else text}]  # pyright: ignore
        for part, text in example.items()
    }


def _is_set_off(example: dict[str, Any]) -> bool:
    """Whether white space stands between the prompt and an answer, or there is no prompt."""
    prompt, *answers = example.values()
    return not prompt.strip() or prompt[-1:].isspace() or any(answer[:1].isspace() for answer in answers)


def _as_one_text(example: dict[str, Any]) -> dict[str, Any]:
    """Answers that begin with white space after the prompt."""
    joined = example["prompt"][-1:].isspace() or not example["prompt"]
    return {
        part: text if part == "prompt" or joined or text[:1].isspace() else f" {text}"
        for part, text in example.items()
    }


def _in_form(rows: Dataset, source: Reading) -> Dataset:
    """Rows whose columns are already the trainers' own, converted to conversations or texts if requested, or if no
    answer continues its prompt: "Why?" and "So." are two turns, and "Why?" alone is one, not the beginning of a text.
    """
    parts = [part for part in _ROLES if part in rows.column_names]
    auto = source.form == "auto"
    if (auto and not source.strict) or "prompt" not in parts:
        return rows
    examples = [{part: row[part] for part in parts} for row in rows.to_list()]
    if auto:
        if not _has_texts(examples) or any(map(_is_set_off, examples)):
            return rows
        in_form = _as_messages if source.chat() else _as_one_text
        return Dataset.from_list([in_form(example) for example in examples])
    if source.form == "conversation":
        return Dataset.from_list([_as_messages(example) for example in examples]) if _has_texts(examples) else rows
    if _has_texts(examples):
        return rows
    for index, example in enumerate(examples):
        if any(not isinstance(value, list) or len(value) != 1 for value in example.values()):
            raise ArmError(
                f"{source.place(index)}: data.format='text' needs a prompt and answers of one message each. Use "
                "data.format='conversation', or give texts."
            )
    return Dataset.from_list([
        _as_one_text({part: str(value[0]["content"]) for part, value in example.items()}) for example in examples
    ])  # fmt: skip


def _begins_with_user(answer: Any) -> bool:
    return isinstance(answer, list) and isinstance(answer[0], Mapping) and answer[0].get("role") == "user"


def _check_messages(messages: Sequence[Any], part: str, where: str) -> None:
    """Refuse messages that a chat template would write as something else than they are meant to be."""
    for message in messages:
        if not isinstance(message, Mapping):
            continue  # `check_rows` names it
        if isinstance(message.get("content"), list):
            raise ArmError(
                f"{where}: {part!r} has a message whose content is a list of parts. The models here read text: give "
                "the content as one text."
            )
        role = message.get("role")
        if isinstance(role, str) and role not in ROLES:
            raise ArmError(
                f"{where}: {part!r} has a message of the role {shown(role)}. It must be one of "
                f"{', '.join(ROLES)}. Rename it."
            )
    last = messages[-1] if messages else None
    if part != "prompt" and isinstance(last, Mapping) and last.get("role", "assistant") not in _ANSWERERS:
        raise ArmError(
            f"{where}: {part!r} ends with a message of the role {shown(last['role'])}. An answer must be the "
            "assistant's: rename the role, or remove the message."
        )


def _check(rows: Dataset, source: Reading) -> None:
    """Refuse rows that cannot be trained on or measured; the message names the place of the first one."""
    parts = [part for part in _ROLES if part in rows.column_names]
    first: dict[str, str] = {}
    for index, row in enumerate(rows.select_columns(parts)) if parts else ():
        values = {part: dict(row)[part] for part in parts}
        kinds = {part: "a text" if isinstance(v, str) else "a list of messages" for part, v in values.items()}
        first = first or kinds
        readable = all(isinstance(value, str | list) for value in values.values())
        if readable and (len(set(kinds.values())) > 1 or kinds != first):
            here = ", ".join(f"{part} is {kind}" for part, kind in kinds.items())
            other = "" if kinds == first else ", other than in the first row"
            fix = "Give all parts of all rows as texts, or all as lists of messages."
            if isinstance(values.get("prompt"), str) and _begins_with_user(values.get("chosen")):
                fix = "The answers begin with the question, so remove the column prompt."
            raise ArmError(f"{source.place(index)} mixes two formats: {here}{other}. {fix}")
        for part, value in values.items():
            if isinstance(value, list):
                _check_messages(value, part, source.place(index))
    readable = [columns for columns in FORMATS if set(columns) <= set(rows.column_names)]
    if not readable:
        return  # prompts, which need no answers
    try:
        check_rows(rows if readable[0] not in PAIR_FORMATS else rows.select_columns(list(readable[0])), None)
    except DataError as error:
        if match := re.match(r"Row (\d+): (.*)", str(error), re.DOTALL):
            raise ArmError(f"{source.place(int(match[1]))}: {match[2]}") from error
        raise ArmError(f"{source.name!r}: {error}") from error
