"""Logistic regression on the base model's states, fitted on the scorer split: the probability of a chosen answer.

An answer is represented by the mean over its tokens of the states in the middle of the model, where meaning is most
linear. Unlike `classifier`, which counts words, it reads the answer after its prompt, and knows words that are not in
the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.generation import plain
from steertune.recipes.lab.scorers import Scorer, as_rows, fit_on_pairs

_ROWS = 8


class Options(BaseModel, extra="forbid", strict=True):
    """`C`: inverse strength of the regularisation."""

    C: float = Field(default=0.01, gt=0)


def fit(options: Options, rows: Dataset, model: Any, tokenizer: Any) -> Scorer:
    """Fit chosen answers of the rows against rejected ones.

    Raises:
        ArmError: fewer than 8 rows.
    """
    sides = [(plain(row["prompt"]), plain(row[side])) for side in ("chosen", "rejected") for row in map(dict, rows)]
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=options.C, max_iter=1000))
    accuracy = fit_on_pairs(classifier, _states(model, tokenizer, sides))

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        scores: list[float | None] = [None] * len(answers)
        written = [i for i, answer in enumerate(answers) if answer.strip()]
        if written:
            states = _states(model, tokenizer, [(prompts[i], answers[i]) for i in written])
            for i, probability in zip(written, classifier.predict_proba(states)[:, 1], strict=True):
                scores[i] = float(probability)
        return scores

    return Scorer(score, f"classifier of the base's states on {len(rows)} pairs of its own", accuracy)


@torch.no_grad()
def _states(model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
    """Mean state of every answer, `(answers, D)`; `texts` are prompts with their answers."""
    means = []
    for batch in batches(tokenizer, as_rows(tokenizer, texts), _ROWS):
        batch = batch.to(model.device)
        states = model(**batch.inputs, output_hidden_states=True, use_cache=False).hidden_states
        h_BTD = states[len(states) // 2].float()
        answer_BT = (batch.labels != -100).to(h_BTD.dtype)
        means.append(torch.einsum("btd,bt->bd", h_BTD, answer_BT) / answer_BT.sum(dim=1, keepdim=True))
    return torch.cat(means).cpu().double().numpy()
