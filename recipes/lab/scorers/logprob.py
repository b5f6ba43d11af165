"""The base model as scorer: how much likelier the answer is after one instruction than after its opposite.

`[log p(answer | positive, prompt) - log p(answer | negative, prompt)] / tokens`, in nats per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from pydantic import BaseModel, Field

from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.scorers import Scorer, as_rows
from steertune.trainers import ModelAt

_ROWS = 8


class Options(BaseModel, extra="forbid", strict=True):
    """`positive`, `negative`: instructions that are put before the prompt."""

    positive: str = Field(min_length=1)
    negative: str = Field(min_length=1)


def fit(options: Options, rows: Dataset, model: Any, tokenizer: Any) -> Scorer:
    """The model as a scorer; nothing is fitted. `model` is the base model, without an adapter."""

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        written = [i for i, answer in enumerate(answers) if answer.strip()]
        sides = [
            _mean_logps(model, tokenizer, [(f"{instruction}\n\n{prompts[i]}", answers[i]) for i in written])
            for instruction in (options.positive, options.negative)
        ]
        scores: list[float | None] = [None] * len(answers)
        for i, positive, negative in zip(written, *sides, strict=True):
            scores[i] = positive - negative
        return scores

    return Scorer(score, f"log-probability contrast of the base model: {options.positive!r} - {options.negative!r}")


@torch.no_grad()
def _mean_logps(model: Any, tokenizer: Any, rows: list[tuple[str, str]]) -> list[float]:
    if not rows:
        return []
    data = as_rows(tokenizer, rows)
    means: list[float] = []
    for batch in batches(tokenizer, data, _ROWS):
        means += ModelAt(model, model, batch.to(model.device))(1.0).mean_logps.tolist()
    return means
