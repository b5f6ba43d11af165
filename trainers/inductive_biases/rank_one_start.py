"""Start near activation addition without a constant: one direction of a map starts as a closed-form direction.

A map that writes a block's MLP into the residual stream adds `(a·x) v` more once its weight is `W + v aᵀ`: in LoRA
`W x + s B A x` with `v / s` as B's first column and `a` as A's first row, in full finetuning in the weight itself. The
row a is the one that comes nearest to `a·x = 1` on the training answers' inputs x_t, by ridge regression:

    a = argmin Σ_t (a·x_t - 1)² + λ |a|² = Xᵀ (X Xᵀ + λ I)⁻¹ 1

So on states like these the first pass is activation addition, and on other states only to the degree that they are
similar. A LoRA with `lora_bias=True`, or a model whose maps have biases, can start exactly there:
`direction_start`. The bias checks that the block's output moves by `(a·x) v`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...adapters.blocks import find_blocks
from ...adapters.observing import base_model
from ..types import SteeringRun
from ._base import BiasError, write_of
from ._closed_form import ClosedForm, off, run

_TOKENS = 1024  # inputs that the row is fitted on, evenly drawn: the system has as many equations
_RIDGE = 1e-3  # of the median squared length of an input; a few massive inputs would dominate the mean


@dataclass(frozen=True)
class RankOneStart(ClosedForm):
    """The first direction of a LoRA, or an additional one of a trained weight, starts as a closed-form direction."""

    def start(self, trainer: SteeringRun) -> None:
        """Compute the direction on the training pairs, fit the row, and write both.

        Raises:
            BiasError: neither a new LoRA nor the weight is trained there, the data are not pairs, or the block's
                output does not move by `(a·x) v` (because of a norm after the MLP, or of DoRA, which scales it).
        """
        model: Any = trainer.model
        base = base_model(model)
        index, name = write_of(model, self.layer, "mlp")
        module, block = base.get_submodule(name), find_blocks(base)[index][1]
        matrices, factor = _matrices(module, name, isinstance(model, PeftModel))
        direction, batches = self.computed(trainer, index)
        # fit the row on the states of the training answers
        inputs = [run(model, module, block, batch).inputs[batch["completion_mask"].bool()] for batch in batches]
        states = torch.cat(inputs).float()
        row = ones_row(states[:: -(-len(states) // _TOKENS)])  # at most `_TOKENS`, evenly drawn
        # write both, and check that the block's output moves as it should
        before, values = run(model, module, block, batches[0]), [matrix.detach().clone() for matrix in matrices]
        _write(matrices, row, direction / factor)
        after = run(model, module, block, batches[0])
        expected = (before.inputs.float() @ row.to(before.inputs.device).float())[..., None] * direction.to(
            before.output.device
        )
        if (distance := off(before, after, expected)) is not None:
            with torch.no_grad():
                for matrix, value in zip(matrices, values, strict=True):
                    matrix.copy_(value)
            raise BiasError(
                f"rank_one_start: what {name} adds does not reach the output of block {index} unchanged (off by "
                f"{distance:.1e}: another module follows it, or scales it). Use a plain LoRA, or a steering vector "
                f"with init={self.direction!r}."
            )


def ones_row(inputs: Tensor) -> Tensor:
    """The row a whose product with every input is nearest to 1, `(d,)`; see the docstring of this module.

    Args:
        inputs: `(tokens, d)`.
    """
    x = inputs.double()
    gram = x @ x.T
    ridge = _RIDGE * gram.diagonal().median() * torch.eye(len(x), dtype=x.dtype, device=x.device)
    return (x.T @ torch.linalg.solve(gram + ridge, x.new_ones(len(x)))).float()


def _matrices(module: nn.Module, name: str, adapter_only: bool) -> tuple[list[Tensor], float]:
    """The matrices to write to, and the factor on them: a new LoRA's two, or the map's own weight.

    With an adapter it is never the base model's weight, which would change the reference too.
    """
    if isinstance(module, LoraLayer):
        for adapter in (adapter for adapter in module.active_adapters if adapter in module.lora_A):
            a, b = (getattr(side[adapter], "weight", None) for side in (module.lora_A, module.lora_B))
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.requires_grad and b.requires_grad:
                if bool(b.any()):
                    raise BiasError(f"rank_one_start: the LoRA at {name} is already trained. Start from a new one.")
                return [a, b], float(module.scaling[adapter])
    weight = None if adapter_only else getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.requires_grad:
        return [weight.T if isinstance(module, Conv1D) else weight], 1.0
    raise BiasError(
        f"rank_one_start: neither a LoRA of two matrices nor the map itself is trained at {name}. Put it among LoRA's "
        "target_modules, or use a steering vector with init=."
    )


@torch.no_grad()
def _write(matrices: list[Tensor], row: Tensor, vector: Tensor) -> None:
    """Make a map add `(row·x) vector`."""
    if len(matrices) == 1:
        [weight] = matrices
        weight += torch.outer(vector.to(weight), row.to(weight))
    else:
        a, b = matrices
        a[0], b[:, 0] = row.to(a), vector.to(b)
