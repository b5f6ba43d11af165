"""Logistic regression on words and word pairs, fitted on the scorer split: the probability of a chosen answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from pydantic import BaseModel, Field
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from steertune.recipes.lab.generation import plain
from steertune.recipes.lab.scorers import Scorer, fit_on_pairs


class Options(BaseModel, extra="forbid", strict=True):
    """`C`: inverse strength of the regularisation."""

    C: float = Field(default=10.0, gt=0)


def fit(options: Options, rows: Dataset, model: Any, tokenizer: Any) -> Scorer:
    """Fit chosen answers of the rows against rejected ones.

    Raises:
        ArmError: fewer than 8 rows.
    """
    texts = [plain(row[side]) for side in ("chosen", "rejected") for row in map(dict, rows)]
    classifier = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=options.C))
    accuracy = fit_on_pairs(classifier, texts)

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return [float(p) for p in classifier.predict_proba(list(answers))[:, 1]]

    return Scorer(score, f"classifier on {len(rows)} pairs of its own", accuracy, reads_text_alone=True)
