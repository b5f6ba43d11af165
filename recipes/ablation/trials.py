"""Which trial of a tuning is the best one, and by how much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steertune.recipes.ablation.strengths import TRAINED

_LARGEST = 8.0  # a learning rate is changed by no more than this
Trial = Mapping[str, Any]
"""A setting with the strength that it is used at, its score on the validation rows, the standard error of that
(`error`), and its accuracy; whether it reached the grid's KL (`matched`), and at which share of the grid's KLs its
strength is like those of training (`landed`)."""


def best_first(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that have a score, the one to take first.

    Two things count before the score. A trial that does not reach the grid's KL is at another, where accuracy is
    cheaper or dearer; one that must be scaled far is not what was trained, and would win no claim.
    """
    scored = [trial for trial in trials if trial["score"] is not None]
    return sorted(scored, key=lambda trial: (trial["matched"], trial["landed"], trial["score"]), reverse=True)


def landed_at(strength: float, kl: float, targets: Sequence[float]) -> float:
    """Share of the grid's KLs whose strengths are like in training, from the strength at one KL: a KL is about
    quadratic in a strength."""
    low, high = TRAINED
    return float(np.mean([low <= strength * math.sqrt(target / kl) <= high for target in targets]))


def landing_factor(strength: float, kl: float, targets: Sequence[float]) -> float:
    """What to multiply a learning rate by, so that the strengths of the grid's KLs lie around 1: the strength in the
    middle of them, from that at one KL."""
    middle = math.sqrt(min(targets) * max(targets))
    return min(_LARGEST, max(1 / _LARGEST, strength * math.sqrt(middle / kl)))


def lead(trials: Sequence[Trial]) -> dict[str, float]:
    """Whether the best trial is used at strengths like those of training; how far it leads the second, in standard
    errors of its score (below zero where a better score was passed over for its strength); and their accuracies on the
    validation rows. Nothing where it has no second."""
    ranked = best_first(trials)
    if not ranked:
        return {}
    first, facts = ranked[0], {"tuning_landed": ranked[0]["landed"]}
    if len(ranked) < 2 or not first.get("error"):
        return facts
    return facts | {
        "tuning_lead": (first["score"] - ranked[1]["score"]) / first["error"],
        "tuning_best": first["accuracy"],
        "tuning_second": ranked[1]["accuracy"],
    }
