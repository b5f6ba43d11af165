"""Scorers: how much of a behaviour an answer shows. Each file is one kind, named by the file. A task selects one:

    [[tasks]]
    name = "cautious_advice"
    scorer = { kind = "classifier" }

A file defines `Options` (its keys) and `fit(options, rows, model, tokenizer) -> Scorer`. The rows are the scorer split
of the task, which no arm trains on or is measured on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset
from pydantic import ValidationError
from sklearn.model_selection import GroupKFold, cross_val_score

from steertune.adapters.registry import file_names
from steertune.recipes.lab.arm import check_tables
from steertune.recipes.lab.division import SMALLEST
from steertune.recipes.lab.files import ArmError, nearest, reasons
from steertune.recipes.lab.forms import has_template
from steertune.recipes.lab.generation import plain

_CHECKED = 100  # pairs on which a scorer that is not fitted is checked


@dataclass(frozen=True)
class Scorer:
    """A fitted scorer.

    Attributes:
        score: Prompts and answers (plain text) -> one number per answer, None if judging failed.
        note: A description for the report; `fit` adds how good it is.
        accuracy: Cross-validated accuracy of a fitted scorer; None if nothing was fitted: `fit` checks it on the rows.
        reads_text_alone: Whether it only reads the answer's text, so that it is free to run.
    """

    score: Callable[[Sequence[str], Sequence[str]], list[float | None]]
    note: str
    accuracy: float | None = None
    reads_text_alone: bool = False


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
        raise ArmError(f"scorer.kind={kind!r} must be one of {names()}.{nearest(kind, names())}")
    made = importlib.import_module(f"{__name__}.{kind}").Options
    check_tables("scorer", options, made)
    try:
        return kind, made(**options)
    except ValidationError as error:
        raise ArmError(f"scorer: {reasons(error)}") from error


def fit(table: dict[str, Any], rows: Dataset, model: Any, tokenizer: Any) -> Scorer:
    """The scorer of a task, fitted on its scorer split."""
    kind, options = read(table)
    scorer: Scorer = importlib.import_module(f"{__name__}.{kind}").fit(options, rows, model, tokenizer)
    if scorer.accuracy is not None:
        return replace(scorer, note=f"{scorer.note}, cross-validated accuracy {scorer.accuracy:.2f}")
    return replace(scorer, note=f"{scorer.note}{_checked(scorer, rows)}")


def _checked(scorer: Scorer, rows: Dataset) -> str:
    """A note on how often a scorer that was not fitted prefers the chosen answer of a pair to the rejected one."""
    checked = rows.select(range(min(_CHECKED, len(rows))))
    if not len(checked):
        return ", not checked on pairs (splits.scorer = 0)"
    gaps: list[float] = []
    # the first pair alone: if the judge cannot be reached, the others are not sent
    for part in (checked.select([0]), checked.select([*range(1, len(checked))])):
        prompts = [plain(prompt) for prompt in part["prompt"]]
        sides = [scorer.score(prompts, [plain(answer) for answer in part[side]]) for side in ("chosen", "rejected")]
        gaps += [good - bad for good, bad in zip(*sides, strict=True) if good is not None and bad is not None]
        if not gaps:
            break
    if not gaps:
        return f", which judged none of {len(checked)} pairs"
    right, ties = sum(gap > 0 for gap in gaps), sum(gap == 0 for gap in gaps)
    undecided = f", and prefers neither answer in {ties}" if ties else ""
    return f", which prefers the chosen answer in {right} of {len(gaps)} pairs{undecided}"


def fit_on_pairs(classifier: Any, features: Any) -> float:
    """Fit a classifier on the answers of some pairs; return its cross-validated accuracy. `features` has the chosen
    answers of all pairs, then the rejected ones.

    Raises:
        ArmError: there are fewer than 8 pairs, the smallest part of a divided file.
    """
    pairs = len(features) // 2
    if pairs < SMALLEST:
        raise ArmError(f"splits.scorer={pairs}: a classifier needs {SMALLEST} rows or more.")
    labels, groups = np.repeat([1, 0], pairs), np.tile(np.arange(pairs), 2)  # both answers of a pair in one fold
    accuracy = cross_val_score(classifier, features, labels, groups=groups, cv=GroupKFold(5)).mean()
    classifier.fit(features, labels)
    return float(accuracy)


def as_rows(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> Dataset:
    """Prompts and answers as rows: messages if the tokenizer has a chat template, else plain text."""
    if not has_template(tokenizer):
        return Dataset.from_list([{"prompt": f"{prompt}\n", "completion": answer} for prompt, answer in texts])
    roles = ("prompt", "user"), ("completion", "assistant")
    return Dataset.from_list(
        [
            {name: [{"role": role, "content": text}] for (name, role), text in zip(roles, pair, strict=True)}
            for pair in texts
        ]
    )
