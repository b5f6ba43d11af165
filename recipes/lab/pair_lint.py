"""Find problems that make pairs teach or measure something unintended. They are only warnings."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.sparse import vstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from steertune.recipes.lab.similarity import By, digest, text_of, texts, words

LONGER = 0.8
"""Warn if one side is longer in at least this share of the pairs, and"""
RATIO = 1.3
"""on average at least this many times as long."""
TELLING = 0.9
"""Warn if a bag of words has at least this accuracy: single words then give the behaviour away."""
EDGE = 0.05
"""A base model is at its floor or ceiling within this distance of accuracy 0 or 1."""
LISTED = 10
"""Maximum number of rows that are named."""
_FOLDS, _FEWEST, _MOST = 5, 10, 2000


@dataclass(frozen=True)
class Finding:
    """One problem of pairs.

    Attributes:
        text: The problem, and what to do about it.
        rows: Places of the first rows that it is about.
        value: The measured number, if there is one.
    """

    check: str
    text: str
    rows: tuple[str, ...] = ()
    value: float | None = None


def lint(rows: Dataset, by: By, place: Callable[[int], str]) -> list[Finding]:
    """Check preference pairs; other rows get no findings."""
    if not {"chosen", "rejected"} <= set(rows.column_names):
        return []
    pairs = rows.to_list()
    findings = [_equal(pairs, place), _duplicates(pairs, by, place), _lengths(pairs), _words(pairs, by)]
    return [finding for finding in findings if finding is not None]


def at_edge(accuracy: float, pairs: int) -> Finding | None:
    """A finding if a base model already orders nearly all pairs right, or nearly none."""
    measured = f"The base model prefers the chosen answer in {accuracy:.0%} of {pairs} pairs"
    if accuracy >= 1 - EDGE:
        text = f"{measured}, which leaves little to gain. Look at margins and answers, or use harder pairs."
        return Finding("ceiling", text, value=accuracy)
    if accuracy <= EDGE:
        text = f"{measured}. Are chosen and rejected the wrong way round, or of very different lengths?"
        return Finding("floor", text, value=accuracy)
    return None


def warn(findings: Sequence[Finding | None], name: str) -> None:
    """Print findings on standard error."""
    for finding in findings:
        if finding is not None:
            print(f"Warning: {name}: {finding.text}", file=sys.stderr)


def warn_of(rows: Dataset, by: By, name: str) -> None:
    """Check the pairs of a recipe, and print the findings; `steertune lint` names the rows."""
    warn(lint(rows, by, str), name)


def _equal(pairs: Sequence[dict[str, Any]], place: Callable[[int], str]) -> Finding | None:
    same = [i for i, row in enumerate(pairs) if words(text_of(row["chosen"])) == words(text_of(row["rejected"]))]
    # where every pair differs in case or punctuation only, that is the behaviour
    if not same or (len(same) == len(pairs) and all(row["chosen"] != row["rejected"] for row in pairs)):
        return None
    text = (
        f"{len(same)} of {len(pairs)} pairs have the same words in both answers, so they differ in case or "
        "punctuation at most. Remove them, unless that is the behaviour."
    )
    return _of_rows("equal", text, same, place)


def _duplicates(pairs: Sequence[dict[str, Any]], by: By, place: Callable[[int], str]) -> Finding | None:
    words_of_rows, before, twice = texts(pairs, by), set(), []
    for i, text in enumerate(words_of_rows):
        if text in before:
            twice.append(i)
        before.add(text)
    if not twice:
        return None
    same = Counter(json.dumps(row, sort_keys=True, default=str) for row in pairs)
    copies = sum(count - 1 for count in same.values())
    what = "prompt" if by == "prompt" else "text"
    text = (
        f"{len(twice)} of {len(pairs)} rows repeat the {what} of an earlier row, and {copies} of these the whole row. "
        "They count several times in training."
    )
    return _of_rows("duplicates", text, twice, place)


def _of_rows(check: str, text: str, rows: Sequence[int], place: Callable[[int], str]) -> Finding:
    """A finding about some rows: their number is its value, and the first of them are named."""
    return Finding(check, text, tuple(map(place, rows[:LISTED])), len(rows))


def _lengths(pairs: Sequence[dict[str, Any]]) -> Finding | None:
    chosen, rejected = ([len(words(text_of(row[side]))) for row in pairs] for side in ("chosen", "rejected"))
    if len(pairs) < _FEWEST:
        return None
    longer = float(np.mean(np.sign(np.subtract(chosen, rejected)) / 2 + 0.5))
    means = float(np.mean(chosen)), float(np.mean(rejected))
    uneven = max(longer, 1 - longer) >= LONGER and max(means) >= RATIO * max(min(means), 0.5)
    if not uneven:
        return None
    side, share = ("chosen", longer) if longer > 0.5 else ("rejected", 1 - longer)
    return Finding(
        "lengths",
        f"The {side} answer is the longer one in {share:.0%} of the pairs (on average {means[0]:.0f} words chosen, "
        f"{means[1]:.0f} rejected), so length may be learned in place of the behaviour. Bring both to one length, or "
        "use a loss that divides by it.",
        value=longer,
    )


def _words(pairs: Sequence[dict[str, Any]], by: By) -> Finding | None:
    accuracy = words_accuracy(pairs, by)
    if accuracy is None or accuracy < TELLING:
        return None
    return Finding(
        "bag of words",
        f"Single words tell chosen from rejected in {accuracy:.0%} of pairs that were not used to find them, so pair "
        "accuracy may show these words and not the behaviour. Look at generated answers too.",
        value=accuracy,
    )


def words_accuracy(pairs: Sequence[dict[str, Any]], by: By) -> float | None:
    """How often a linear model of the words identifies the chosen answer of a pair whose prompt it was not fitted on.

    Cross-validated by prompt, on 2,000 pairs at most; None for fewer than 10 prompts.
    """
    pairs = pairs[:_MOST]
    groups = [digest(text) for text in texts(pairs, by)]
    if len(set(groups)) < _FEWEST:
        return None
    answers = [[text_of(row[side]) for row in pairs] for side in ("chosen", "rejected")]
    vectors = CountVectorizer(token_pattern=r"(?u)\w+|[^\w\s]", lowercase=False, binary=True)
    try:
        vectors.fit(answers[0] + answers[1])
    except ValueError:  # no words at all
        return None
    differences = (vectors.transform(answers[0]) - vectors.transform(answers[1])).tocsr()
    right = np.zeros(len(pairs))
    for fitted, tested in GroupKFold(_FOLDS).split(differences, groups=groups):
        # both orders of every pair, so that no order is favoured
        both = vstack([differences[fitted], -differences[fitted]])
        model = LogisticRegression(fit_intercept=False, max_iter=200)
        model.fit(both, np.repeat([1, 0], len(fitted)))
        right[tested] = np.sign(model.decision_function(differences[tested])) / 2 + 0.5
    return float(right.mean())
