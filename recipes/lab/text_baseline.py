"""A baseline that only reads the text: TF-IDF of words, or of characters, with a logistic regression.

Every result of a monitor needs this comparison: if bad rows have words that innocent ones lack, a probe that reads the
model's states may do no more than detect these words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from steertune.recipes.lab.similarity import text_of

TextFeatures = Literal["words", "characters"]
FEATURES: dict[TextFeatures, dict[str, Any]] = {
    "words": {"ngram_range": (1, 2), "token_pattern": r"(?u)\w+|[^\w\s]"},
    "characters": {"analyzer": "char", "ngram_range": (1, 4), "lowercase": False},
}
_C = 10.0


def texts_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Prompts and answers as text."""
    return [f"{text_of(row['prompt'])}\n{text_of(row['completion'])}" for row in rows]


def text_scores(
    features: TextFeatures, fitted_on: Sequence[str], bad: Sequence[bool], texts: Sequence[str]
) -> list[float]:
    """Log-odds that texts are bad.

    Args:
        features: The features of a text that are counted.
        fitted_on: Texts that the classifier is fitted on.
        bad: Whether each of these is bad; some are and some are not.
        texts: Texts to score.
    """
    if not texts:
        return []
    classifier = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, **FEATURES[features]), LogisticRegression(C=_C, max_iter=1000)
    )
    classifier.fit(list(fitted_on), np.asarray(bad, dtype=int))
    return [float(score) for score in classifier.decision_function(list(texts))]
