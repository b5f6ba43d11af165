"""LEACE: remove a binary concept from states with the least change, so that no linear probe can detect it.

Belrose et al. 2306.03819, theorem 4.3: `r(x) = x - W⁺ P W (x - E[x])` with the whitening `W = Σ^(-1/2)` and the
orthogonal projection P onto `W Σ_xz`. For two classes `Σ_xz` is one vector, along the difference of their means, and

    r(x) = x - u (w·(x - E[x])),   u = Σ_xz,   w = Σ⁺ Σ_xz / (Σ_xz·Σ⁺ Σ_xz)

So it writes along the mean difference (activation addition's vector) and reads along the whitened one (`lda` without
shrinkage). Afterwards both classes have the same mean, so that no linear probe can tell them apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NOTHING = 1e-12
_RANK = 1e-10  # share of the largest eigenvalue: directions of less variance are ignored


@dataclass(frozen=True)
class Eraser:
    """A fitted `r(x)`.

    Attributes:
        mean: `E[x]`, `(d,)`.
        written: The direction u that is removed, `(d,)`.
        read: The direction w that measures how much of u to remove, `(d,)`, with `w·u = 1`.
    """

    mean: Tensor
    written: Tensor
    read: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """`r(x)` for states `(..., d)`, in their own precision."""
        exact = states.to(self.mean)
        erased = exact - ((exact - self.mean) @ self.read)[..., None] * self.written
        return erased.to(states)


def erase(chosen: Tensor, rejected: Tensor) -> Eraser:
    """Fit an eraser of the difference between chosen and rejected states, both `(pairs, d)`.

    Raises:
        ValueError: both classes have the same mean, so no direction separates them.
    """
    states = torch.cat([chosen, rejected]).double()
    mean = states.mean(dim=0)
    centred = states - mean
    # The label z of each state is ±1/2, and cross is its covariance Σ_xz with the states, (d,).
    half = torch.cat([torch.ones(len(chosen)), -torch.ones(len(rejected))]).double()[:, None] / 2
    cross = (centred * (half - half.mean())).mean(dim=0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(states))
    varying = values > _RANK * values[-1]
    whitened = vectors[:, varying] @ ((vectors[:, varying].T @ cross) / values[varying])  # Σ⁺ Σ_xz, (d,)
    length = cross @ whitened  # between 0 and 1/4: the share of the classes' variance that is linear in x
    if not length > _NOTHING:
        raise ValueError(
            "Chosen and rejected states have the same mean, so no direction separates them. Give answers that differ."
        )
    return Eraser(mean, cross, whitened / length)
