"""The base class of biases that start at a direction: options, the direction, and a check of the block's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...adapters import directions
from ...adapters.observing import base_model, evaluating
from ...adapters.outputs import states_in
from ..initial_vectors import pair_batches
from ..types import SteeringRun
from ._base import Bias, BiasError, check_layer


@dataclass(frozen=True)
class ClosedForm(Bias):
    """A start that writes a direction into the output of one block's MLP.

    Args:
        direction: A file of `adapters/directions/`.
        layer: The block whose output is changed: an index, or a fraction of the depth.
        scale: Factor on the direction's own length.

    Raises:
        ValueError: the direction is unknown, or `layer` is not a layer.
    """

    direction: str = "mean_difference"
    layer: int | float = 0.67
    scale: float = 1.0

    def __post_init__(self) -> None:
        directions.get(self.direction)
        check_layer(self.layer)

    def computed(self, trainer: SteeringRun, index: int) -> tuple[Tensor, Any]:
        """Compute the direction at a layer, `(d,)`, and the batches of training pairs that it comes from.

        Raises:
            BiasError: the data are not pairs.
        """
        batches = pair_batches(trainer)
        if batches is None:
            name = type(self).__module__.rpartition(".")[2]
            raise BiasError(f"{name} computes {self.direction!r} from pairs, but the training data have none.")
        return directions.compute(self.direction, trainer.model, batches, [index]).vectors[index] * self.scale, batches


class Pass(NamedTuple):
    """A map's inputs and its block's output in one forward pass."""

    inputs: Tensor  # (rows, tokens, inputs of the map)
    output: Tensor  # (rows, tokens, d)
    real: Tensor | None  # True on tokens that are not padding, (rows, tokens); None for all


@torch.no_grad()
def run(model: nn.Module, module: nn.Module, block: nn.Module, batch: Any) -> Pass:
    """Run one batch through the model with its adapters, and capture a map's inputs and a block's output."""
    states: dict[str, Tensor] = {}

    def capture(_: nn.Module, args: Any, output: Any) -> None:
        states["output"] = states_in(output)

    handles = [
        module.register_forward_pre_hook(lambda _, args: states.update(inputs=args[0])),
        block.register_forward_hook(capture),
    ]
    device = next(model.parameters()).device
    inputs = {k: batch[k].to(device) for k in ("input_ids", "attention_mask") if k in batch}
    try:
        with evaluating(model):
            base_model(model)(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    mask = inputs.get("attention_mask")
    return Pass(states["inputs"], states["output"], None if mask is None else mask.bool())


def off(before: Pass, after: Pass, expected: Tensor) -> float | None:
    """The error of an output relative to the expected change; None if rounding explains it.

    Args:
        before: The pass without the change.
        after: The pass with it.
        expected: The change, `(width,)` for every token or `(rows, tokens, width)`.
    """
    real = slice(None) if before.real is None else before.real
    old, new = before.output[real], after.output[real]  # (real tokens, width)
    change = expected.to(old).expand_as(before.output)[real].float()
    eps = torch.finfo(old.dtype).eps
    old, new = old.float(), new.float()
    gap = (new - old - change).abs()
    rounding = 16 * eps * torch.maximum(old.abs(), new.abs()) + 1e-3 * change.abs().max() + 16 * eps
    return float(gap.max() / change.norm(dim=-1).max()) if bool((gap > rounding).any()) else None
