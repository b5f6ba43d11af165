"""In-context vector, as the released code computes it (github shengliu66/ICV, tasks/base.py, `obtain_icv`).

`PCA(1).components_.sum(0) + PCA.mean_` over the concatenated differences of all layers. The component has length 1 and
the mean a length of hundreds, so this is nearly the mean difference (cosine above 0.999 on real data). It is separate
from `icv` because papers quote the formula of one and numbers of the other.
"""

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

POOL = "last"


def fit(chosen: dict[int, Tensor], rejected: dict[int, Tensor]) -> dict[int, Tensor]:
    """`(pairs, d)` per layer -> `(d,)` per layer, in units of the residual stream."""
    layers = sorted(chosen)
    differences = torch.cat([chosen[i] - rejected[i] for i in layers], dim=1)
    pca = PCA(n_components=1).fit(differences.double().numpy())
    released: np.ndarray = pca.components_.sum(0) + pca.mean_  # pyright: ignore[reportOptionalMemberAccess]
    direction = torch.from_numpy(released).float()
    return dict(zip(layers, direction.split([chosen[i].shape[1] for i in layers]), strict=True))
