"""LAT reading vector: per layer, PCA of the paired differences (RepE, Zou et al. 2310.01405, section 3.1).

The official code shuffles the order within pairs and then centres, so that the two classes lie on both sides of the
origin. Taking every pair in both orders makes the centring exact and needs no random numbers: it is the first
principal direction about the origin. Length 1; the labels only give the sign, that of the mean difference.
"""

from torch import Tensor

from ._pca import first_direction

POOL = "last"


def fit(chosen: dict[int, Tensor], rejected: dict[int, Tensor]) -> dict[int, Tensor]:
    """`(pairs, d)` per layer -> `(d,)` per layer."""
    return {layer: first_direction(chosen[layer] - rejected[layer]) for layer in chosen}
