"""Linear discriminant: the difference of the class means, whitened, `Σ⁻¹ (mean(chosen) - mean(rejected))`.

Σ is the covariance within the classes, shrunk towards its diagonal (Ledoit and Wolf 2004 on standardised states, by
scikit-learn), because there are fewer pairs than dimensions. Length 1. It is the best linear classifier of Gaussian
classes, but whitening makes it worse for steering (Marks and Tegmark 2310.06824, section 5: mass-mean probing).
"""

import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

POOL = "completion_mean"


def fit(chosen: dict[int, Tensor], rejected: dict[int, Tensor]) -> dict[int, Tensor]:
    """`(pairs, d)` per layer -> `(d,)` per layer; a single pair cannot be whitened, so its difference is used."""
    return {layer: _fit(chosen[layer].double(), rejected[layer].double()) for layer in chosen}


def _fit(chosen: Tensor, rejected: Tensor) -> Tensor:
    direction = chosen.mean(dim=0) - rejected.mean(dim=0)
    if len(chosen) > 1:
        states = torch.cat([chosen, rejected])
        labels = torch.cat([torch.ones(len(chosen)), torch.zeros(len(rejected))])
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(states.numpy(), labels.numpy())
        direction = torch.from_numpy(model.coef_[0])
    return (direction / direction.norm().clamp_min(1e-12)).float()
