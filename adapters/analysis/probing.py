"""Evaluate a direction as a probe: how well its projections separate states that it was not fitted on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from torch import Tensor

Pairs = tuple[Tensor, Tensor]
"""Chosen and rejected states of one layer, each `(pairs, d)`."""
_BINS = 10


@dataclass(frozen=True)
class Reading:
    """The metrics of a direction as a probe of held-out pairs.

    Attributes:
        pair_accuracy: Share of pairs whose chosen answer has the larger projection; a tie counts half.
        accuracy: Share of single answers on the right side of a threshold.
        auroc: Area under the ROC curve.
        brier: Mean squared error of the probability; 0.25 for a coin flip.
        calibration_error: Mean gap between probability and frequency over ten bins, weighted by their size.
    """

    pair_accuracy: float
    accuracy: float
    auroc: float
    brier: float
    calibration_error: float


def read(direction: Tensor, fitted_on: Pairs, held_out: Pairs) -> Reading:
    """Evaluate a direction as a probe of held-out answers.

    Threshold and slope of the probability come from a logistic regression on the one-dimensional projections of the
    answers that the direction was fitted on (Platt scaling).

    Args:
        direction: `(d,)`, of any length.
        fitted_on: The answers that it was fitted on.
        held_out: Answers that it was not fitted on.

    Raises:
        ValueError: the direction is zero or not finite.
    """
    if not torch.isfinite(direction).all() or not direction.norm() > 0:
        raise ValueError("The direction is zero or not finite, so it cannot be used as a probe.")
    fitted, labels = _projections(direction, fitted_on)
    projections, truth = _projections(direction, held_out)
    centre, spread = fitted.mean(), fitted.std() + 1e-12
    scale = LogisticRegression(C=1e6).fit((fitted - centre) / spread, labels)
    probability = scale.predict_proba((projections - centre) / spread)[:, 1]
    chosen, rejected = np.split(projections[:, 0], 2)
    return Reading(
        pair_accuracy=float((np.sign(chosen - rejected) + 1).mean() / 2),
        accuracy=float(((probability > 0.5) == truth).mean()),
        auroc=float(roc_auc_score(truth, projections[:, 0])),
        brier=float(brier_score_loss(truth, probability)),
        calibration_error=calibration_error(probability, truth),
    )


def _projections(direction: Tensor, pairs: Pairs) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Projections `(2 * pairs, 1)`, those of chosen answers first, and whether each is of a chosen answer."""
    unit = direction.double() / direction.double().norm()
    values = torch.cat([side.double() @ unit for side in pairs]).numpy()[:, None]
    return values, np.repeat([True, False], [len(pairs[0]), len(pairs[1])])


def calibration_error(probability: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """Mean gap between probability and frequency over ten equal bins of probability, weighted by their size.

    Args:
        probability: `(rows,)`, between 0 and 1.
        truth: Whether the predicted event occurred, `(rows,)`.
    """
    bins = np.minimum((probability * _BINS).astype(int), _BINS - 1)
    gaps = [(bins == b).mean() * abs(probability[bins == b].mean() - truth[bins == b].mean()) for b in np.unique(bins)]
    return float(sum(gaps))
