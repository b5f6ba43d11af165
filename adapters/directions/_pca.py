"""The first principal direction of differences, about the origin."""

import torch
from torch import Tensor


def first_direction(differences: Tensor) -> Tensor:
    """Unit vector `u` that maximises `Σ (u·x_i)²` over rows `x_i` `(pairs, d)`, with the sign of their mean.

    About the origin, not about the mean: centring would remove the difference between the classes.
    """
    _, _, rows = torch.linalg.svd(differences.double(), full_matrices=False)
    direction = rows[0]
    sign = torch.sign(direction @ differences.double().mean(dim=0))
    return (direction * (sign if sign != 0 else 1)).float()
