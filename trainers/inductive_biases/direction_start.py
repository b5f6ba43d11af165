"""Start as activation addition: a trained constant is initialised with a closed-form direction.

LoRA with `lora_bias=True` on the map that writes a block's MLP into the residual stream computes
`W x + (B A x + b) s`: with `b = v / s` its first forward pass adds v to the output of the block, as a steering vector
does. The same holds for a trained bias of that map. The change is checked at the block's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ...adapters.blocks import find_blocks
from ...adapters.observing import base_model
from ..types import SteeringRun
from ._base import BiasError, write_of
from ._closed_form import ClosedForm, off, run


@dataclass(frozen=True)
class DirectionStart(ClosedForm):
    """Initialise a trained constant at one block with a direction."""

    def start(self, trainer: SteeringRun) -> None:
        """Compute the direction on the training pairs, and write it.

        Raises:
            BiasError: nothing trained there can hold a constant, the data are not pairs, or the block's output does
                not change by the direction (because of a norm after the MLP, say).
        """
        model = trainer.model
        index, name = write_of(model, self.layer, "mlp")
        base = base_model(model)
        bias, factor = _constant(base.get_submodule(name), name, isinstance(model, PeftModel))
        direction, batches = self.computed(trainer, index)
        module, block = base.get_submodule(name), find_blocks(base)[index][1]
        before = run(model, module, block, batches[0])
        with torch.no_grad():
            bias += (direction / factor).to(bias)
        if (distance := off(before, run(model, module, block, batches[0]), direction)) is not None:
            with torch.no_grad():
                bias -= (direction / factor).to(bias)
            raise BiasError(
                f"direction_start: a constant in {name} does not move the output of block {index} by the same vector "
                f"(by {distance:.1e}: another module follows it). Use a steering vector with init={self.direction!r}."
            )


def _constant(module: nn.Module, name: str, adapter_only: bool) -> tuple[Tensor, float]:
    """A trained constant at the output of a map, and the factor it is multiplied by.

    With an adapter it is the adapter's: a bias of the base model would change the reference too.
    """
    if isinstance(module, LoraLayer):
        for adapter in module.active_adapters:
            bias = getattr(module.lora_B[adapter], "bias", None) if adapter in module.lora_B else None
            if isinstance(bias, Tensor) and bias.requires_grad:
                return bias, float(module.scaling[adapter])
    bias = None if adapter_only else getattr(module, "bias", None)
    if isinstance(bias, Tensor) and bias.requires_grad:
        return bias, 1.0
    raise BiasError(
        f"direction_start: nothing trained at {name} can hold a constant. Use LoraConfig(lora_bias=True) with that "
        "map among its target_modules, or a steering vector with init=."
    )
