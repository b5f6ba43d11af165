"""Try one row of everything before any work, so that errors come before an hour of training, also in dry runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset

from steertune.recipes.lab.arm import Arm
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.evaluate import evaluate
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.generation import check_context, row_lengths
from steertune.recipes.lab.ingredients.teachers import Teachers
from steertune.recipes.lab.ingredients.views import Views as ViewTables
from steertune.recipes.lab.observe import HeldOut
from steertune.recipes.lab.progress import aside
from steertune.trainers import ModelAt, NonFiniteError, context_length, tokenise
from steertune.trainers.row_checks import check_rows
from steertune.trainers.views import Views

_SHORTEN = "Shorten or remove such rows, or choose a model that reads more."


def rehearse(held_out: HeldOut, names: Sequence[str] | None = None) -> None:
    """Check the rows that models are measured on, and measure the base model on one row of every kind.

    Raises:
        ArmError: a row or its answer is longer than the model's context, or the model's answers are not finite.
        DataError: test or neutral rows that could not be trained on either.
    """
    model, tokenizer = held_out.model, held_out.tokenizer
    # all rows fit the tokenizer and the model, with the answers that will be generated
    for rows, what, answers in (
        (held_out.pairs, "The test rows", held_out.generations),
        (held_out.neutral, "The neutral text", held_out.neutral_generations),
        (held_out.asked, "The prompts to answer", held_out.generations),
    ):
        if not rows:
            continue
        if {"chosen", "completion", "text", "messages"} & {*rows.column_names}:
            check_rows(rows, tokenizer)
            check_context(model, tokenizer, rows, 0, what, _SHORTEN)
        if answers and "prompt" in rows.column_names:
            prompts = rows.select_columns(["prompt"]).select(range(min(answers, len(rows))))
            check_context(model, tokenizer, prompts, held_out.new_tokens, f"{what}, with generated answers", _SHORTEN)

    # one row of each kind goes through every observer; a scorer may be a paid service
    one = replace(
        held_out,
        pairs=held_out.pairs.select(range(min(1, len(held_out.pairs)))),
        neutral=held_out.neutral.select([0]),
        generations=min(1, held_out.generations),
        neutral_generations=min(1, held_out.neutral_generations),
        questions=min(1, held_out.questions),
        new_tokens=1,
        scorer=None,
        prompted=None,
        prefix=None,
        plain=None,
        shared={},
        neutral_logps={},
    )
    try:
        with aside("one row of everything"):
            evaluate(model, one, names)
    except NonFiniteError as error:
        raise ArmError(
            "The base model's log-probabilities of the first test row or neutral row are not finite. Its weights may "
            "be damaged, or its number format too narrow: try model.dtype = 'float32'."
        ) from error


def rehearse_training(arm: Arm | None, model: Any, tokenizer: Any, rows: Dataset) -> list[str]:
    """Check an arm's training rows and their views, and run the base model on one of them. Without an arm, a direction
    is computed from the rows.

    Returns:
        Notes on the rows for the user.

    Raises:
        DataError: rows that cannot be trained on.
        ViewError: a view cannot be made of them.
    """
    notes = rehearse_rows(model, tokenizer, rows)
    if arm is not None:
        rehearse_views(arm, model, tokenizer, rows)
    return notes


def rehearse_views(arm: Arm, model: Any, tokenizer: Any, rows: Dataset) -> None:
    """Make an arm's views of all rows: some may be too long, and a chat template may refuse what a view adds.

    Raises:
        ViewError: a view cannot be made of them.
    """
    if seen := arm.views_seen():
        views = arm.get(ViewTables).views(known=arm.get(Teachers).tables, tokenizer=tokenizer)
        shown = {name: view for name, view in views.items() if name in seen}
        Views(shown, tokenizer, context_length(model.config, tokenizer)).add(rows, tokenise(rows, tokenizer))


@torch.no_grad()
def rehearse_rows(model: Any, tokenizer: Any, rows: Dataset) -> list[str]:
    """Check training rows, and run the base model on one of them; return notes on them for the user.

    Raises:
        DataError: rows that cannot be trained on.
    """
    check_rows(rows, tokenizer)
    context = context_length(model.config, tokenizer)
    [batch] = batches(tokenizer, rows.select([0]), 1)
    ModelAt(model, model, batch.to(model.device))(1.0)
    lengths = row_lengths(tokenizer, rows)
    cut = sum(length > context for length in lengths) if context is not None else 0
    if not cut:
        return []
    return [
        f"{cut} of {len(rows)} training rows are longer than the model's context of {context} tokens (the longest: "
        f"{max(lengths)}) and are cut there."
    ]
