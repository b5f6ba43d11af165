"""Linear discriminant: the mean difference, whitened, `Σ⁻¹ (mean(bad) - mean(innocent))`.

Σ is one covariance for both classes, of all rows about the mean of their own class, shrunk towards its diagonal
(Ledoit and Wolf 2004, on standardised states). So a single bad row is enough: the innocent rows alone can give the
covariance. (`adapters/directions/lda.py` averages the covariances of both classes, and one row has none.)
"""

import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor


def fit(bad: Tensor, innocent: Tensor) -> Tensor:
    """`(bad rows, d)` and `(innocent rows, d)` -> `(d,)`; for one bad and one innocent row, their difference."""
    bad, innocent = bad.double(), innocent.double()
    difference_D = bad.mean(dim=0) - innocent.mean(dim=0)
    within_ND = torch.cat([bad - bad.mean(dim=0), innocent - innocent.mean(dim=0)])
    scale_D = within_ND.std(dim=0)
    if len(within_ND) < 3 or not scale_D.any():
        return difference_D.float()
    scale_D = scale_D.clamp_min(1e-6 * float(scale_D.max()))
    covariance_DD, _ = ledoit_wolf((within_ND / scale_D).numpy(), assume_centered=True)
    whitened_D = torch.linalg.solve(torch.from_numpy(covariance_DD), difference_D / scale_D)
    return (whitened_D / scale_D).float()
