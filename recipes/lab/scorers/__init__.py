"""What says how much of a behaviour an answer shows. Each file is one kind, named by the file. A task says which:

    [[tasks]]
    name = "cautious_advice"
    scorer = { kind = "classifier" }

A file defines `Options` (its keys) and `fit(options, rows, model, tokenizer) -> Scorer`. The rows are the scorer split
of the task, which no arm trains on or is measured on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from pydantic import ValidationError

from steertune.adapters.registry import file_names
from steertune.recipes.lab.arm import known_tables
from steertune.recipes.lab.files import ArmError, nearest, reasons


@dataclass(frozen=True)
class Scorer:
    """A fitted scorer.

    Attributes:
        score: Prompts and answers (plain text) -> one number an answer, None where judging failed.
        note: What it is and how good it is, for the report.
    """

    score: Callable[[Sequence[str], Sequence[str]], list[float | None]]
    note: str


def names() -> list[str]:
    """The kinds: the files of this folder."""
    return file_names(__path__[0])


def read(table: dict[str, Any]) -> tuple[str, Any]:
    """Kind and checked options of a task's `scorer` table.

    Raises:
        ArmError: an unknown kind or option.
    """
    options = dict(table)
    kind = str(options.pop("kind", "classifier"))
    if kind not in names():
        raise ArmError(f"scorer.kind={kind!r} is none of {names()}.{nearest(kind, names())}")
    made = importlib.import_module(f"{__name__}.{kind}").Options
    known_tables("scorer", options, made)
    try:
        return kind, made(**options)
    except ValidationError as error:
        raise ArmError(f"scorer: {reasons(error)}") from error


def fit(table: dict[str, Any], rows: Dataset, model: Any, tokenizer: Any) -> Scorer:
    """The scorer of a task.

    Args:
        table: As in the grid: `kind`, and the kind's options.
        rows: The task's scorer split.
        model: The base model, for kinds that ask it.
        tokenizer: Its tokenizer.
    """
    kind, options = read(table)
    return importlib.import_module(f"{__name__}.{kind}").fit(options, rows, model, tokenizer)
