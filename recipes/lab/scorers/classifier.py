"""Logistic regression on words and word pairs, fitted on the scorer split: the probability of a chosen answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from pydantic import BaseModel, Field
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline

from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.generation import plain
from steertune.recipes.lab.scorers import Scorer


class Options(BaseModel, extra="forbid", strict=True):
    """`C`: inverse strength of the regularisation."""

    C: float = Field(default=10.0, gt=0)


def fit(options: Options, rows: Dataset, model: Any, tokenizer: Any) -> Scorer:
    """Chosen answers of the rows against rejected ones.

    Raises:
        ArmError: fewer than 10 rows.
    """
    if len(rows) < 10:
        raise ArmError(f"splits.scorer={len(rows)}: a classifier needs 10 rows or more.")
    texts = [plain(row[side]) for side in ("chosen", "rejected") for row in map(dict, rows)]
    labels = np.repeat([1, 0], len(rows))
    model_ = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=options.C))
    pairs = np.tile(np.arange(len(rows)), 2)  # both answers of a pair in the same fold
    accuracy = cross_val_score(model_, texts, labels, groups=pairs, cv=GroupKFold(5)).mean()
    model_.fit(texts, labels)

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return [float(p) for p in model_.predict_proba(list(answers))[:, 1]]

    return Scorer(score, f"classifier on {len(rows)} pairs of its own, cross-validated accuracy {accuracy:.2f}")
