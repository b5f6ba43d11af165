"""Start near activation addition without a bias: one direction of a LoRA begins as a closed-form direction.

LoRA on the map that writes a block's MLP into the residual stream computes `W x + s B A x`. With `v / s` as B's first
column and `a` as A's first row it adds `(a·x) v`, and a is the row that comes nearest to `a·x = 1` on the training
answers' inputs x_t, by ridge regression:

    a = argmin Σ_t (a·x_t - 1)² + λ |a|² = Xᵀ (X Xᵀ + λ I)⁻¹ 1

So on states like these the first pass is activation addition, and on others as much of it as they are alike. A LoRA
with `lora_bias=True` can start exactly there: `direction_start`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ...adapters import directions
from .._modes import evaluating
from .._start import pair_batches
from ..prefix.cut import base_of
from ._base import Bias, BiasError, write_of

_TOKENS = 1024  # inputs that the row is fitted on, evenly drawn: the system has as many equations
_RIDGE = 1e-3  # of the median squared length of an input; the mean would be that of a few massive ones


@dataclass(frozen=True)
class RankOneStart(Bias):
    """The first direction of a LoRA starts as a direction.

    Args:
        direction: A file of `adapters/directions/`.
        layer: At whose output: an index, or a fraction of the depth.
        scale: Times its own length.

    Raises:
        ValueError: no such direction.
    """

    direction: str = "mean_difference"
    layer: int | float = 0.67
    scale: float = 1.0

    def __post_init__(self) -> None:
        directions.get(self.direction)

    def start(self, trainer: Any) -> None:
        """Compute the direction on the training pairs, fit the row, and write both.

        Raises:
            BiasError: no LoRA that is new is trained there, or the data are no pairs.
        """
        index, name = write_of(trainer.model, self.layer, "mlp")
        module = base_of(trainer.model).get_submodule(name)
        a, b, factor = _first_direction(module, name)
        batches = pair_batches(trainer)
        if batches is None:
            raise BiasError(f"rank_one_start computes {self.direction!r} from pairs, and the training data have none.")
        found = directions.compute(self.direction, trainer.model, batches, [index]).vectors[index] * self.scale
        row = ones_row(_inputs(trainer.model, module, batches))
        with torch.no_grad():
            a[0] = row.to(a)
            b[:, 0] = (found / factor).to(b)


def ones_row(inputs: Tensor) -> Tensor:
    """The row a whose product with every input is nearest to 1, `(d,)`; see the module.

    Args:
        inputs: `(tokens, d)`.
    """
    x = inputs.double()
    gram = x @ x.T
    ridge = _RIDGE * gram.diagonal().median() * torch.eye(len(x), dtype=x.dtype, device=x.device)
    return (x.T @ torch.linalg.solve(gram + ridge, x.new_ones(len(x)))).float()


def _first_direction(module: nn.Module, name: str) -> tuple[Tensor, Tensor, float]:
    """LoRA's two matrices at a map, and what their product is multiplied by."""
    if isinstance(module, LoraLayer):
        for adapter in (adapter for adapter in module.active_adapters if adapter in module.lora_A):
            a, b = (side[adapter].weight for side in (module.lora_A, module.lora_B))
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.requires_grad and b.requires_grad:
                if bool(b.any()):
                    raise BiasError(f"rank_one_start: the LoRA at {name} is trained already. Start from a new one.")
                return a, b, float(module.scaling[adapter])
    raise BiasError(
        f"rank_one_start: no LoRA is trained at {name}. Put that map among its target_modules, or use a steering "
        "vector with init=."
    )


@torch.no_grad()
def _inputs(model: nn.Module, module: nn.Module, batches: Any) -> Tensor:
    """What a map is given at the answers' tokens of all batches, `(tokens, d)`; at most some."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: Any) -> None:
        seen.append(args[0])

    handle, found = module.register_forward_pre_hook(keep), []
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            for batch in batches:
                base_of(model)(**{k: batch[k].to(device) for k in ("input_ids", "attention_mask") if k in batch})
                found.append(seen.pop()[batch["completion_mask"].to(device).bool()].float())
    finally:
        handle.remove()
    rows = torch.cat(found)
    return rows[:: -(-len(rows) // _TOKENS)]
