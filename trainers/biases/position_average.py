"""Gradients averaged over positions: a weight learns from the mean input, as an input-independent bias does.

The gradient of a linear map `y_t = W x_t` is `Σ_t δ_t x_tᵀ`, with δ_t the gradient at its output. Here it is

    (Σ_t δ_t) (mean_t x_t)ᵀ

over the positions of a row that have a gradient: of rank one for every row, and nothing in it says which position a
change was for. Gradients that flow on to lower layers are as ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._base import Bias, BiasError


@dataclass(frozen=True)
class PositionAverage(Bias):
    """The gradient of every trained linear map, LoRA's two among them, is that of its mean input."""

    def start(self, trainer: Any) -> None:
        """Hang on every trained linear map.

        Raises:
            BiasError: there is none, or several processes reduce gradients while they are computed.
        """
        maps = [m for m in trainer.model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
        if not maps:
            raise BiasError(
                "position_average changes gradients of linear maps, and none is trained: a steering vector's gradient "
                "is a sum over positions already."
            )
        if trainer.accelerator.num_processes > 1 or trainer.is_deepspeed_enabled:
            raise BiasError("position_average replaces gradients as they are computed: use one process.")
        for module in maps:
            _Averaged(module)


class _Averaged:
    """Replaces what the backward passes of a step add up to in the gradient of one linear map."""

    def __init__(self, module: nn.Linear) -> None:
        self.total: Tensor | None = None
        self.replaced = False  # the total has been a gradient: if that is gone, a new step has begun
        module.register_forward_hook(self._forward)
        module.weight.register_post_accumulate_grad_hook(self._replace)

    def _forward(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            inputs, weight = args[0].detach(), module.weight
            output.register_hook(lambda delta: self._add(weight, inputs, delta))

    @torch.no_grad()
    def _add(self, weight: Any, inputs: Tensor, delta: Tensor) -> None:
        if self.replaced and (weight.grad is None or not weight.grad.any()):
            self.total, self.replaced = None, False
        rows = inputs.shape[0] if inputs.ndim > 2 else 1
        x, d = (value.float().reshape(rows, -1, value.shape[-1]) for value in (inputs, delta))
        real = (d != 0).any(dim=-1, keepdim=True).float()
        means = (x * real).sum(dim=1) / real.sum(dim=1).clamp_min(1)
        added = d.sum(dim=1).T @ means
        self.total = added if self.total is None else self.total + added

    @torch.no_grad()
    def _replace(self, weight: Tensor) -> None:
        if self.total is not None and weight.grad is not None:
            weight.grad.copy_(self.total)
            self.replaced = True
