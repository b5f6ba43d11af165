"""What starts that write a direction share: their options, the direction, and whether it comes out of its block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...adapters import directions
from ...adapters.observing import evaluating
from .._start import pair_batches
from ..prefix.decoder import base_of
from ._base import Bias, BiasError, check_layer


@dataclass(frozen=True)
class ClosedForm(Bias):
    """A start that writes a direction where one block's MLP ends.

    Args:
        direction: A file of `adapters/directions/`.
        layer: At whose output: an index, or a fraction of the depth.
        scale: Times its own length.

    Raises:
        ValueError: no such direction, or no layer.
    """

    direction: str = "mean_difference"
    layer: int | float = 0.67
    scale: float = 1.0

    def __post_init__(self) -> None:
        directions.get(self.direction)
        check_layer(self.layer)

    def computed(self, trainer: Any, index: int) -> tuple[Tensor, Any]:
        """The direction at a layer in its length, `(d,)`, and the batches of training pairs that it is from.

        Raises:
            BiasError: the data are no pairs.
        """
        batches = pair_batches(trainer)
        if batches is None:
            name = type(self).__module__.rpartition(".")[2]
            raise BiasError(f"{name} computes {self.direction!r} from pairs, and the training data have none.")
        return directions.compute(self.direction, trainer.model, batches, [index]).vectors[index] * self.scale, batches


class Pass(NamedTuple):
    """What a map was given and its block handed on in one forward pass, `(rows, tokens, width)`, and which tokens are
    real (None: all)."""

    inputs: Tensor
    output: Tensor
    real: Tensor | None


@torch.no_grad()
def run(model: nn.Module, module: nn.Module, block: nn.Module, batch: Any) -> Pass:
    """One batch through the model, with the adapters on."""
    seen: dict[str, Tensor] = {}

    def keep(_: nn.Module, args: Any, output: Any) -> None:
        seen["output"] = output[0] if isinstance(output, tuple) else output

    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.update(inputs=args[0])),
        block.register_forward_hook(keep),
    ]
    device = next(model.parameters()).device
    inputs = {k: batch[k].to(device) for k in ("input_ids", "attention_mask") if k in batch}
    try:
        with evaluating(model):
            base_of(model)(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    mask = inputs.get("attention_mask")
    return Pass(seen["inputs"], seen["output"], None if mask is None else mask.bool())


def off(before: Pass, after: Pass, expected: Tensor) -> float | None:
    """How far an output moved from where it should have, in lengths of what was expected; None if that is the rounding
    of the states, number by number.

    Args:
        before: Without what was written.
        after: With it.
        expected: The change, `(width,)` for every token or `(rows, tokens, width)`.
    """
    kept = slice(None) if before.real is None else before.real
    old, new = before.output[kept], after.output[kept]
    change = expected.to(old).expand_as(before.output)[kept].float()
    eps = torch.finfo(old.dtype).eps
    old, new = old.float(), new.float()
    gap = (new - old - change).abs()
    rounding = 16 * eps * torch.maximum(old.abs(), new.abs()) + 1e-3 * change.abs().max() + 16 * eps
    return float(gap.max() / change.norm(dim=-1).max()) if bool((gap > rounding).any()) else None
