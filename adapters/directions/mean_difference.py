"""Mean difference: `mean(chosen) - mean(rejected)` (CAA, Rimsky et al. 2312.06681, section 3; difference in means).

The mean of paired differences is the difference of the class means, so pairing plays no role in the estimate.
"""

from torch import Tensor

POOL = "completion_mean"


def fit(chosen: dict[int, Tensor], rejected: dict[int, Tensor]) -> dict[int, Tensor]:
    """`(pairs, d)` per layer -> `(d,)` per layer, in units of the residual stream."""
    return {layer: chosen[layer].mean(dim=0) - rejected[layer].mean(dim=0) for layer in chosen}
