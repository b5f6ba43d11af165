"""Train a vector on labelled pairs while the service runs, on the weights that it serves."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from peft import PeftModel
from pydantic import BaseModel, Field

from steertune.adapters.description import write_description
from steertune.recipes.lab.columns import Reading, named
from steertune.recipes.lab.descriptions import data_of
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.forms import has_template
from steertune.recipes.serving.vectors import Vector, Vectors, check_vector_name

MOST_PAIRS, MOST_STEPS = 64, 200


class Pair(BaseModel, extra="forbid"):
    """One prompt and two answers to it; `chosen` is the one to learn."""

    prompt: str = Field(min_length=1, max_length=20_000)
    chosen: str = Field(min_length=1, max_length=20_000)
    rejected: str = Field(min_length=1, max_length=20_000)


class PairTraining(BaseModel, extra="forbid"):
    """`POST /v1/vectors/NAME/train`.

    Attributes:
        pairs: The training pairs.
        arm: The arm to train: one that trains one vector on pairs.
        steps: Optimiser steps; None: four passes through the pairs, at least 16 steps.
    """

    pairs: list[Pair] = Field(min_length=1, max_length=MOST_PAIRS)
    arm: Literal["vector_dpo", "vector_ipo", "vector_bipo", "mean_difference"] = "vector_dpo"
    steps: int | None = Field(default=None, ge=1, le=MOST_STEPS)


def train_vector(vectors: Vectors, tokenizer: Any, name: str, body: PairTraining) -> tuple[Vector, float]:
    """Train a vector and add it under a name; must run on the engine's thread, so answers wait meanwhile.

    The vector is trained on a copy of the model that shares its weights, so that answers do not change. The layers
    below the vector are computed once (see `trainers/prefix`).

    Returns:
        The vector, and the seconds of training.

    Raises:
        ArmError: the pairs cannot be trained on.
    """
    from steertune.recipes.lab.arm import load_arm
    from steertune.recipes.lab.training import fit, make_trainer, silent, training_of
    from steertune.trainers import share_weights

    check_vector_name(name)
    started = time.monotonic()
    rows = rows_of(body.pairs, tokenizer)
    steps = 0 if body.arm == "mean_difference" else body.steps or max(16, 4 * -(-len(rows) // 4))
    settings = ["--trainer.max_steps", str(steps), "--trainer.save_strategy", "no"]
    arm = load_arm(body.arm, settings, recipe="train")
    copy = share_weights(vectors.model)
    base = copy.unload() if isinstance(copy, PeftModel) else copy
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        try:
            trainer = silent(make_trainer(training_of(arm, base, tokenizer, rows, folder)))
            fit(trainer, folder)
        except (ValueError, RuntimeError) as error:
            raise ArmError(f"No vector was trained: {error}") from error
        trainer.save_model(str(folder / "adapter"))
        write_description(folder / "adapter", data=data_of(rows, name))
        return vectors.add(name, folder / "adapter"), time.monotonic() - started


def rows_of(pairs: Sequence[Pair], tokenizer: Any) -> Dataset:
    """Pairs as training rows: messages if the model has a chat template.

    Raises:
        ArmError: the two answers of a pair are the same.
    """
    for number, pair in enumerate(pairs):
        if pair.chosen.strip() == pair.rejected.strip():
            raise ArmError(f"pairs[{number}]: both answers are the same, so nothing can be learned from them.")
    form = "conversation" if has_template(tokenizer) else "text"
    rows, *_ = named(Dataset.from_list([pair.model_dump() for pair in pairs]), Reading(form=form, strict=False))
    return rows
