"""Which trial of a tuning is the best one, and by how much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steertune.recipes.ablation.strengths import TRAINED

_LARGEST = 8.0  # factor by which a learning rate is changed at most
Trial = Mapping[str, Any]
"""A setting with the strength that it is used at, its score on the validation rows, the standard error of that
(`error`), and its accuracy; whether it reached the grid's KL (`matched`), and the share of the grid's KLs at which its
strength is close to that of training (`landed`)."""


def best_first(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that have a score, best first.

    Two things come before the score. A trial that does not reach the grid's KL was measured at another KL, where
    accuracy is easier or harder to get; one that must be scaled far is not what was trained, and would win no claim.
    """
    scored = [trial for trial in trials if trial["score"] is not None]
    return sorted(scored, key=lambda trial: (trial["matched"], trial["landed"], trial["score"]), reverse=True)


def landed_at(strength: float, kl: float, targets: Sequence[float]) -> float:
    """Share of the grid's KLs whose strengths are close to that of training, estimated from the strength at one KL: KL
    is roughly quadratic in the strength."""
    low, high = TRAINED
    return float(np.mean([low <= strength * math.sqrt(target / kl) <= high for target in targets]))


def landing_factor(strength: float, kl: float, targets: Sequence[float]) -> float:
    """The factor for the learning rate that brings the strengths of the grid's KLs close to 1: the strength at the
    middle of these KLs, estimated from the strength at one KL."""
    middle = math.sqrt(min(targets) * max(targets))
    return min(_LARGEST, max(1 / _LARGEST, strength * math.sqrt(middle / kl)))


def lead(trials: Sequence[Trial]) -> dict[str, float]:
    """Whether the best trial is used at strengths close to that of training; how far it leads the second, in standard
    errors of its score (below zero if a better score was passed over for its strength); and their accuracies on the
    validation rows. Only the first of these if there is no second trial, and nothing if no trial has a score."""
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
