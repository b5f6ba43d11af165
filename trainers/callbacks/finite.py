"""Stop at the step where numbers stop being finite, and keep the last good state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from peft import PeftModel
from torch import Tensor

from ...losses import parts
from ..checkpoints import last_checkpoint
from ..rates import describe_rates
from ..types import SteeringRun
from .bad_examples import first_not_finite
from .base import SteeringCallback

_SKIPPED = 40  # fp16 steps in a row: by then the loss scaler has come from 2^16 to 2^-24, so it is not the scale


class NonFiniteError(RuntimeError):
    """Raised when the loss, a gradient or a trained parameter becomes NaN or infinite."""


class FiniteSteps(SteeringCallback):
    """Checks every loss, the gradients before each optimiser step, and the trained parameters after it.

    In fp16 the loss scaler produces infinite gradients on purpose and skips the step; only many skipped steps in a row
    are an error there. Adapters are copied before a step, so that a bad one can be undone; a copy of a whole model
    would take as much memory again.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: SteeringRun) -> None:
        self.trainer = trainer
        self._before: dict[str, Tensor] = {}  # the adapter's parameters before the step
        self._skipped = 0
        self._named: list[tuple[str, Tensor]] = []  # listed once per step: listing takes longer than checking

    def on_micro_step(self, losses: Tensor) -> None:
        """Check the loss on all processes, so that all of them stop, or none. Nothing was updated yet."""
        if not torch.isfinite(losses).all():
            loss = self.trainer.loss
            name = "" if loss is None else f" {type(parts(loss)[-1]).__name__}"
            self._stop(f"The loss{name}", self.trainer.save_last_good())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the gradients, which are already clipped, and copy the adapter."""
        self._named = [*self.trainer.model.named_parameters()]
        if not args.fp16:
            name = _first_bad((name, p.grad) for name, p in self._named)
            if name is not None:
                self._stop(f"The gradient of {name}", self.trainer.save_last_good())
        if isinstance(self.trainer.model, PeftModel):
            self._before = {name: p.detach().clone() for name, p in self._named if p.requires_grad}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the updated parameters; undo the step if one is not finite."""
        model, folder = self.trainer.model, None
        self._skipped = self._skipped + 1 if args.fp16 and self.trainer.accelerator.optimizer_step_was_skipped else 0
        if self._skipped >= _SKIPPED:
            problem = f"In fp16 {_SKIPPED} steps in a row were skipped: some gradient"
            self._stop(problem, self.trainer.save_last_good())
        name = _first_bad((name, p) for name, p in self._named if p.requires_grad)
        if name is None:
            return
        if self._before:
            with torch.no_grad():
                for parameter, value in self._before.items():
                    model.get_parameter(parameter).copy_(value)
            folder = self.trainer.save_last_good()
        self._stop(f"{name} after the update ({describe_rates(self.trainer)})", folder)

    def _stop(self, what: str, folder: str | None) -> NoReturn:
        """Raise a NonFiniteError that names the cause, and where the last good state is (None: not saved now)."""
        trainer = self.trainer
        step = trainer.state.global_step
        saved = f"The state after step {step} is saved in {folder}."
        if folder is None:
            checkpoint = last_checkpoint(str(trainer.args.output_dir))
            saved = f"The last good state is {checkpoint or 'lost: no checkpoint was saved (set save_steps)'}."
        raise NonFiniteError(
            f"{what} is not finite at step {step + 1}. {first_not_finite(trainer)} {saved} Lower the learning rate, "
            "cap the vector (norm='capped'), or look for a bad example."
        )


def _first_bad(tensors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """Name of the first tensor with a value that is not finite; the host waits for the device once, not per tensor."""
    pairs = [(name, tensor) for name, tensor in tensors if tensor is not None]
    if not pairs:
        return None
    device = pairs[0][1].device
    if bool(torch.stack([torch.isfinite(tensor).all().to(device) for _, tensor in pairs]).all()):
        return None
    return next(name for name, tensor in pairs if not torch.isfinite(tensor).all())
