"""Gradients averaged over positions: a weight learns from the mean input, as an input-independent bias does.

The gradient of a linear map `y_t = W x_t` is `Σ_t δ_t x_tᵀ`, with δ_t the gradient at its output. Here it is

    (Σ_t δ_t) (mean_t x_t)ᵀ

over the positions of a row that have a gradient: of rank one for every row, and nothing in it says which position a
change was for. Gradients that flow on to lower layers are as ever, and so is that of the head (and of embeddings tied
to it), whose every position is a prediction of its own.
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

from ..prefix.decoder import base_of
from ._base import Bias, BiasError


@dataclass(frozen=True)
class PositionAverage(Bias):
    """The gradient of every trained linear map, LoRA's two among them, is that of its mean input."""

    whole_rows: ClassVar[bool] = True

    def start(self, trainer: Any) -> None:
        """Refuse what cannot be averaged.

        Raises:
            BiasError: no linear map is trained, or another matrix is, or one that several modules share; or several
                processes reduce gradients while they are computed.
        """
        maps = _maps(trainer.model)
        if not maps:
            raise BiasError(
                "position_average changes gradients of linear maps, and none is trained: a steering vector's gradient "
                "is a sum over positions already."
            )
        if trainer.accelerator.num_processes > 1 or trainer.is_deepspeed_enabled:
            raise BiasError("position_average replaces gradients as they are computed: use one process.")
        users = Counter(id(module.weight) for module in maps.values())
        tables = [module for module in trainer.model.modules() if isinstance(module, nn.Embedding)]
        known = {id(module.weight) for module in (*maps.values(), *_ends(trainer.model), *tables)}
        left = [name for name, p in trainer.model.named_parameters()
                if p.requires_grad and p.ndim > 1 and id(p) not in known]  # fmt: skip
        left += [name for name, module in maps.items() if users[id(module.weight)] > 1]
        if left:
            raise BiasError(
                f"position_average knows linear maps that are used once; {left[:4]} are trained and none of these. "
                "Train an adapter on linear maps (target_modules)."
            )

    @contextmanager
    def during(self, trainer: Any) -> Iterator[None]:
        """Hang on every trained linear map."""
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
    """Trained linear maps but the head."""
    heads = {id(module.weight) for module in _ends(model)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module.weight.requires_grad and id(module.weight) not in heads
    }


def _ends(model: nn.Module) -> list[Any]:
    """Embeddings and head."""
    base: Any = base_of(model)
    found = [base.get_input_embeddings(), base.get_output_embeddings()]
    return [module for module in found if getattr(module, "weight", None) is not None]


class _Steps(TrainerCallback):
    """Starts the sums anew with every optimiser step."""

    def __init__(self, averages: list[_Averaged]) -> None:
        self.averages = averages

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer event: a step begins."""
        for average in self.averages:
            average.total = None


class _Averaged:
    """Replaces what the backward passes of a step add up to in the gradient of one linear map."""

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.turned = name, isinstance(module, Conv1D)  # which keeps its weight as (inputs, outputs)
        self.total: Tensor | None = None
        self._handles = [
            module.register_forward_hook(self._forward),
            module.weight.register_post_accumulate_grad_hook(self._replace),
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _forward(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        inputs = args[0].detach()
        if inputs.ndim < 3:
            raise BiasError(
                f"position_average: {self.name} is given tokens of all rows as one ({tuple(inputs.shape)}, an expert, "
                "say), so nothing says which row a position belongs to. Train other maps (target_modules)."
            )
        output.register_hook(lambda delta: self._add(inputs, delta))

    @torch.no_grad()
    def _add(self, inputs: Tensor, delta: Tensor) -> None:
        x, d = (value.float().flatten(1, -2) for value in (inputs, delta))
        real = (d != 0).any(dim=-1, keepdim=True).float()
        means = (x * real).sum(dim=1) / real.sum(dim=1).clamp_min(1)
        added = d.sum(dim=1).T @ means
        added = added.T if self.turned else added
        self.total = added if self.total is None else self.total + added

    @torch.no_grad()
    def _replace(self, weight: Tensor) -> None:
        if self.total is not None and weight.grad is not None:
            weight.grad.copy_(self.total)
