"""Stop at the step where numbers stop being finite, and keep the last good state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

if TYPE_CHECKING:
    from ._mixin import SteeringMixin


class NonFiniteError(RuntimeError):
    """The loss or a gradient became NaN or infinite."""


def check_finite(trainer: SteeringMixin, what: str, value: Tensor) -> None:
    """Raise a NonFiniteError unless all values are finite; the parameters have not been updated yet, so save them."""
    if torch.isfinite(value).all():
        return
    folder = trainer.save_last_good()
    raise NonFiniteError(
        f"{what} is not finite at step {trainer.state.global_step + 1}. The state after step "
        f"{trainer.state.global_step} is kept in {folder}. Lower the learning rate, cap the vector "
        "(norm='capped'), or look for a bad example."
    )


class FiniteGradients(TrainerCallback):
    """Checks the gradients before each optimiser step (not in fp16, whose loss scaler meets infinities on purpose)."""

    def __init__(self, trainer: SteeringMixin) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer event: gradients are there and clipped, parameters not yet changed."""
        if args.fp16:
            return
        for name, parameter in self.trainer.model.named_parameters():
            if parameter.grad is not None:
                check_finite(self.trainer, f"The gradient of {name}", parameter.grad)
