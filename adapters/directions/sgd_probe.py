"""Linear probe: like `probe`, but trained by stochastic gradient descent.

Scikit-learn's `SGDClassifier` with the logistic loss, a constant step and weights averaged over all steps, on states
centred and divided by their overall standard deviation as in `probe`. Length 1.
"""

import numpy as np
import torch
from sklearn.linear_model import SGDClassifier
from torch import Tensor

POOL = "completion_mean"
_EPOCHS, _RATE = 50, 1e-2


def fit(chosen: dict[int, Tensor], rejected: dict[int, Tensor]) -> dict[int, Tensor]:
    """`(pairs, d)` per layer -> `(d,)` per layer."""
    return {layer: _fit(chosen[layer], rejected[layer]) for layer in chosen}


def _fit(chosen: Tensor, rejected: Tensor) -> Tensor:
    states = torch.cat([chosen, rejected]).double()
    states = (states - states.mean(dim=0)) / states.std().clamp_min(1e-12)
    labels = torch.cat([torch.ones(len(chosen)), torch.zeros(len(rejected))])
    step = {"learning_rate": "constant", "eta0": _RATE, "average": True, "max_iter": _EPOCHS, "tol": None}
    probe = SGDClassifier(loss="log_loss", random_state=0, **step).fit(states.numpy(), labels.numpy())
    weights = torch.from_numpy(np.asarray(probe.coef_)[0])
    return (weights / weights.norm()).float()
