"""Random directions, the control for a steering vector: a vector of the same length at the same place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def random_directions(vectors: Sequence[Tensor], seed: int) -> list[Tensor]:
    """For every vector `(d,)` a random direction of the same length, from one seed."""
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(len(vector_D), generator=generator).to(vector_D) for vector_D in vectors]
    return [
        direction_D * vector_D.norm() / direction_D.norm()
        for vector_D, direction_D in zip(vectors, directions, strict=True)
    ]
