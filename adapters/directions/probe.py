"""Logistic-regression probe: the normal of the plane that separates chosen from rejected states.

The weights of scikit-learn's `LogisticRegression` (L2, C=1) on the states divided by their overall standard deviation,
one number per layer, so that the penalty means the same at every layer. Length 1. Good at detection, often poor
at steering (AxBench, Wu et al. 2501.17148, tables 1 and 2; ITI, Li et al. 2306.03341).
"""

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

POOL = "completion_mean"


def fit(chosen: dict[int, Tensor], rejected: dict[int, Tensor]) -> dict[int, Tensor]:
    """`(pairs, d)` per layer -> `(d,)` per layer."""
    return {layer: _fit(chosen[layer], rejected[layer]) for layer in chosen}


def _fit(chosen: Tensor, rejected: Tensor) -> Tensor:
    states = torch.cat([chosen, rejected]).double()
    states = (states - states.mean(dim=0)) / states.std().clamp_min(1e-12)
    labels = torch.cat([torch.ones(len(chosen)), torch.zeros(len(rejected))])
    probe = LogisticRegression(max_iter=2000).fit(states.numpy(), labels.numpy())
    weights = torch.from_numpy(probe.coef_[0])
    return (weights / weights.norm()).float()
