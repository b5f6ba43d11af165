"""Rank-one gradients: each trained matrix's gradient keeps only its largest singular pair.

With plain SGD one step then changes one direction. Momentum adds those of earlier steps, and AdamW divides element by
element, so that its steps have full rank again. In a LoRA the two matrices are projected, not their product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..types import SteeringRun
from ._base import Bias, BiasError, trained_matrices

_EXTRA = 6  # columns of the random projection beyond the rank, and its power iterations: enough for one pair


@dataclass(frozen=True)
class RankOne(Bias):
    """The gradient G of a trained matrix becomes `σ₁ u₁ v₁ᵀ`, its best approximation of rank one.

    The gradient of an input-independent bias is already an outer product. That of a weight is a sum of outer products,
    one per position, and this keeps what they agree on.
    """

    def start(self, trainer: SteeringRun) -> None:
        """Refuse a model or set-up without such a gradient.

        Raises:
            BiasError: no matrix is trained, or gradients are sharded.
        """
        if not trained_matrices(trainer.model):
            raise BiasError("rank_one projects gradients of matrices, but none is trained: a vector's have rank one.")
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise BiasError("rank_one needs whole gradients, which DeepSpeed and FSDP shard. Use DDP or one process.")

    @torch.no_grad()
    def gradients(self, trainer: SteeringRun) -> None:
        """Project every matrix's gradient."""
        for parameter in trained_matrices(trainer.model).values():
            if parameter.grad is None or min(parameter.shape[-2:]) == 1 or not parameter.grad.isfinite().all():
                continue
            gradient = parameter.grad.float()
            if min(gradient.shape[-2:]) <= 64:
                u, s, v = torch.linalg.svd(gradient, full_matrices=False)
                v = v.mT
            else:
                with torch.random.fork_rng([gradient.device] if gradient.device.type == "cuda" else []):
                    torch.manual_seed(0)  # the same projection in every run; other random numbers are not affected
                    u, s, v = torch.svd_lowrank(gradient, q=1 + _EXTRA, niter=_EXTRA)
            parameter.grad.copy_(s[..., :1, None] * u[..., :, :1] @ v[..., :, :1].mT)
