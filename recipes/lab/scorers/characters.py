"""Logistic regression on character n-grams: the probability of a chosen answer.

It sees what a classifier of words does not (capitals, punctuation, line breaks), needs no model, and is fitted in a
moment. It is the default scorer of a training on pairs without one.
"""

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

_EDGES = "\x02", "\x03"  # mark the start and the end of an answer for the n-grams


class Options(BaseModel, extra="forbid", strict=True):
    """`C`: inverse strength of the regularisation. `longest`: length of the longest n-gram."""

    C: float = Field(default=10.0, gt=0)
    longest: int = Field(default=4, ge=1)


def fit(options: Options, rows: Dataset, model: Any, tokenizer: Any) -> Scorer:
    """Fit chosen answers of the rows against rejected ones.

    Raises:
        ArmError: fewer than 8 rows.
    """
    texts = [plain(row[side]) for side in ("chosen", "rejected") for row in map(dict, rows)]
    features = TfidfVectorizer(
        analyzer="char", ngram_range=(1, options.longest), lowercase=False, sublinear_tf=True, binary=True
    )
    classifier = make_pipeline(features, LogisticRegression(C=options.C))
    accuracy = fit_on_pairs(classifier, _framed(texts))

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return [float(p) for p in classifier.predict_proba(_framed(answers))[:, 1]]

    return Scorer(score, f"classifier of characters on {len(rows)} pairs", accuracy, reads_text_alone=True)


def _framed(texts: Sequence[str]) -> list[str]:
    return [f"{_EDGES[0]}{text.strip()}{_EDGES[1]}" for text in texts]
