"""In-context vector, as defined in the paper (Liu, Ye, Xing, Zou, ICML 2024, 2311.06668, section 3).

The states of all layers are concatenated, `R^(L·d)`. The vector is the first principal direction of the paired
differences at the last token. It has length 1 over all layers together. The released code computes something else: see
`icv_released`.
"""

import torch
from torch import Tensor

from ._pca import first_direction

POOL = "last"


def fit(chosen: dict[int, Tensor], rejected: dict[int, Tensor]) -> dict[int, Tensor]:
    """`(pairs, d)` per layer -> `(d,)` per layer."""
    layers = sorted(chosen)
    direction = first_direction(torch.cat([chosen[i] - rejected[i] for i in layers], dim=1))
    return dict(zip(layers, direction.split([chosen[i].shape[1] for i in layers]), strict=True))
