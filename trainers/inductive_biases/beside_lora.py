"""A LoRA that is trained jointly with a steering vector: both spaces at once (2603.00425, section 5).

With `orthogonal`, what the LoRA writes into the residual stream has no part along the vector v: before every forward
pass, `B <- B - v vᵀ B / |v|²` for the second matrix B of every map that writes into the stream. So the two cannot do
the same work.

The LoRA is not part of the saved adapter, whose file holds only the vector. So this is only for measurements (grids),
and saving raises an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ...adapters import steering_layers
from ...adapters.blocks import find_blocks
from ...adapters.observing import base_model
from ..types import SteeringRun
from ._base import Bias, BiasError, write_of


@dataclass(frozen=True)
class BesideLora(Bias):
    """A new LoRA on the base model, trained at the trainer's `learning_rate`.

    Args:
        r: Its rank.
        lora_alpha: Its scale is `lora_alpha / r`.
        target_modules: As in PEFT's `LoraConfig`.
        orthogonal: Keep what it writes into the residual stream orthogonal to the vector.

    Raises:
        ValueError: the rank is below 1.
    """

    saved: ClassVar[bool] = False

    r: int = 8
    lora_alpha: int = 16
    target_modules: str | tuple[str, ...] = "all-linear"
    orthogonal: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r={self.r!r} must be a whole number of at least 1.")

    def start(self, trainer: SteeringRun) -> None:
        """Inject the LoRA into the base model.

        Raises:
            BiasError: no single vector is trained, or checkpoints would be saved without the LoRA.
        """
        model: Any = trainer.model
        vectors = {id(layer.tied_to.get(name, layer)) for layer in steering_layers(model) for name in layer.config}
        if not isinstance(model, PeftModel) or len(vectors) != 1:
            raise BiasError(
                f"beside_lora trains a LoRA beside one steering vector (got {len(vectors)} vectors). Use a "
                "SteeringVectorConfig with one layer, or tied=True."
            )
        if getattr(trainer.args.save_strategy, "value", trainer.args.save_strategy) != "no":
            raise BiasError("beside_lora: checkpoints would lack the LoRA. Set save_strategy='no'.")
        base, trained = base_model(model), [p for p in model.parameters() if p.requires_grad]
        targets = self.target_modules if isinstance(self.target_modules, str) else [*self.target_modules]
        config = LoraConfig(r=self.r, lora_alpha=self.lora_alpha, target_modules=targets, task_type="CAUSAL_LM")
        # the same name, so that PEFT switches both off for the reference and on again
        inject_adapter_in_model(config, base, str(model.active_adapter))
        for parameter in trained:  # PEFT has frozen everything but the LoRA
            parameter.requires_grad_(True)
        model.register_state_dict_pre_hook(_refuse)

    @contextmanager
    def during(self, trainer: SteeringRun) -> Iterator[None]:
        """Make the LoRA orthogonal after the last step, too."""
        yield
        self.before_forward(trainer)

    @torch.no_grad()
    def before_forward(self, trainer: SteeringRun) -> None:
        """Remove the vector's direction from what the LoRA writes."""
        if not self.orthogonal:
            return
        [v_D, *_] = [layer.written(name).detach() for layer in steering_layers(trainer.model) for name in layer.config]
        for b_DR in writes(trainer.model):
            b_DR -= torch.outer(v_D, v_D @ b_DR) / (v_D @ v_D).clamp_min(1e-12)


def writes(model: nn.Module) -> list[Tensor]:
    """The second matrices, `(d, r)`, of a model's LoRA on maps that write into the residual stream."""
    base: Any = base_model(model)
    matrices = []
    for index in range(len(find_blocks(base))):
        for site in ("attention", "mlp"):
            module = base.get_submodule(write_of(model, index, site)[1])
            if isinstance(module, LoraLayer):
                matrices += [module.lora_B[name].weight for name in module.lora_B]
    return matrices


def _refuse(model: nn.Module, *_: Any) -> None:
    raise BiasError("A vector with a LoRA beside it cannot be saved: its file would hold the vector alone.")
