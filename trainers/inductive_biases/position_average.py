"""Gradients averaged over positions: a weight learns from the mean input, as an input-independent bias does.

The gradient of a linear map `y_t = W x_t` is `Σ_t δ_t x_tᵀ`, with δ_t the gradient at its output. Here it is

    (Σ_t δ_t) (mean_t x_t)ᵀ

over the positions of a row that have a gradient: it has rank one for every row, and no position can have its own
change. Gradients of activations are unchanged, so lower layers get theirs as usual. The gradient of the head (and of
embeddings tied to it) is unchanged too, because each of its positions is a separate prediction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from ...adapters.observing import base_model
from ..types import SteeringRun
from ._base import Bias, BiasError


@dataclass(frozen=True)
class PositionAverage(Bias):
    """Every trained linear map, LoRA's two included, gets the gradient of its mean input."""

    whole_rows: ClassVar[bool] = True

    def start(self, trainer: SteeringRun) -> None:
        """Refuse a model or set-up whose gradients cannot be averaged.

        Raises:
            BiasError: no linear map is trained; another matrix is trained, or one that several modules share; or
                several processes reduce gradients while they are computed.
        """
        maps = _maps(trainer.model)
        if not maps:
            raise BiasError(
                "position_average changes gradients of linear maps, but none is trained: a steering vector's gradient "
                "is already a sum over positions."
            )
        if trainer.accelerator.num_processes > 1 or trainer.is_deepspeed_enabled:
            raise BiasError("position_average replaces gradients as they are computed: use one process.")
        users = Counter(id(module.weight) for module in maps.values())
        tables = [module for module in trainer.model.modules() if isinstance(module, nn.Embedding)]
        covered = {id(module.weight) for module in (*maps.values(), *_ends(trainer.model), *tables)}
        left = [name for name, p in trainer.model.named_parameters()
                if p.requires_grad and p.ndim > 1 and id(p) not in covered]  # fmt: skip
        left += [name for name, module in maps.items() if users[id(module.weight)] > 1]
        if left:
            raise BiasError(
                f"position_average works only on linear maps that are used once, but {left[:4]} are trained too. "
                "Train an adapter on linear maps (target_modules)."
            )

    @contextmanager
    def during(self, trainer: SteeringRun) -> Iterator[None]:
        """Replace the gradient of every trained linear map."""
        averages = [_Averaged(name, module) for name, module in _maps(trainer.model).items()]
        steps = _Steps(averages)
        trainer.add_callback(steps)
        try:
            yield
        finally:
            trainer.remove_callback(steps)
            for average in averages:
                average.remove()


def _maps(model: nn.Module) -> dict[str, Any]:
    """Trained linear maps except the head."""
    heads = {id(module.weight) for module in _ends(model)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module.weight.requires_grad and id(module.weight) not in heads
    }


def _ends(model: nn.Module) -> list[Any]:
    """Embeddings and head."""
    base: Any = base_model(model)
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    return [module for module in ends if module is not None]


class _Steps(TrainerCallback):
    """Clears the sums at every optimiser step."""

    def __init__(self, averages: list[_Averaged]) -> None:
        self.averages = averages

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Clear the sums of the last step."""
        for average in self.averages:
            average.total = None


class _Averaged:
    """Replaces the gradient that the backward passes of a step add up for one linear map."""

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.transposed = name, isinstance(module, Conv1D)  # its weight is (inputs, outputs)
        self.total: Tensor | None = None  # of the step so far, like the weight
        self._handles = [
            module.register_forward_hook(self._forward),
            module.weight.register_post_accumulate_grad_hook(self._replace),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _forward(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        inputs = args[0].detach()
        if inputs.ndim < 3:
            raise BiasError(
                f"position_average: {self.name} gets the tokens of all rows flattened ({tuple(inputs.shape)}, as an "
                "expert does), so it is unknown which row a position belongs to. Train other maps (target_modules)."
            )
        output.register_hook(lambda delta: self._add(inputs, delta))

    @torch.no_grad()
    def _add(self, inputs: Tensor, delta: Tensor) -> None:
        x_BTI, d_BTO = (value.float().flatten(1, -2) for value in (inputs, delta))
        real_BT1 = (d_BTO != 0).any(dim=-1, keepdim=True).float()  # positions that have a gradient
        means_BI = (x_BTI * real_BT1).sum(dim=1) / real_BT1.sum(dim=1).clamp_min(1)
        added = d_BTO.sum(dim=1).T @ means_BI  # (outputs, inputs)
        added = added.T if self.transposed else added
        self.total = added if self.total is None else self.total + added

    @torch.no_grad()
    def _replace(self, weight: Tensor) -> None:
        if self.total is not None and weight.grad is not None:
            weight.grad.copy_(self.total)
