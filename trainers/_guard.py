"""Stop at the step where numbers stop being finite, and keep the last good state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from ._culprit import culprit
from ._resume import last_checkpoint

if TYPE_CHECKING:
    from ._mixin import SteeringMixin

_SKIPPED = 40  # fp16 steps in a row: by then the loss scaler has come from 2^16 to 2^-24, so it is not the scale


class NonFiniteError(RuntimeError):
    """The loss, a gradient or a trained parameter became NaN or infinite."""


def check_finite(trainer: SteeringMixin, what: str, value: Tensor) -> None:
    """Raise a NonFiniteError unless all values are finite; the parameters have not been updated yet, so save them."""
    if not torch.isfinite(value).all():
        _stop(trainer, what, trainer.save_last_good())


def _stop(trainer: SteeringMixin, what: str, folder: str | None) -> NoReturn:
    """Raise the NonFiniteError, with where it came from. What was good is in `folder`, None: nowhere."""
    step = trainer.state.global_step
    kept = f"The state after step {step} is kept in {folder}."
    if folder is None:
        checkpoint = last_checkpoint(str(trainer.args.output_dir))
        kept = f"The last good state is {checkpoint or 'lost: there is no checkpoint (set save_steps)'}."
    raise NonFiniteError(
        f"{what} is not finite at step {step + 1}. {culprit(trainer)} {kept} Lower the learning rate, cap the vector "
        "(norm='capped'), or look for a bad example."
    )


def _first_bad(tensors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """Name of the first tensor with a value that is not finite. One answer is waited for, not one a tensor."""
    there = [(name, tensor) for name, tensor in tensors if tensor is not None]
    if not there or bool(torch.stack([torch.isfinite(t).all().to(there[0][1].device) for _, t in there]).all()):
        return None
    return next(name for name, tensor in there if not torch.isfinite(tensor).all())


class FiniteSteps(TrainerCallback):
    """Checks the gradients before each optimiser step, and what is trained after it.

    In fp16 the loss scaler meets infinite gradients on purpose and skips the step; only a long row of skipped steps is
    an error there. Of an adapter there is a copy from before the step, to go back to; a whole model would take as much
    memory again.
    """

    def __init__(self, trainer: SteeringMixin) -> None:
        self.trainer = trainer
        self._before: dict[str, Tensor] = {}
        self._skipped = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer event: gradients are there and clipped, parameters not yet changed."""
        model = self.trainer.model
        if not args.fp16:
            bad = _first_bad((name, p.grad) for name, p in model.named_parameters())
            if bad is not None:
                _stop(self.trainer, f"The gradient of {bad}", self.trainer.save_last_good())
        if isinstance(model, PeftModel):
            self._before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer event: parameters are changed."""
        model, folder = self.trainer.model, None
        self._skipped = self._skipped + 1 if args.fp16 and self.trainer.accelerator.optimizer_step_was_skipped else 0
        if self._skipped >= _SKIPPED:
            what = f"In fp16 {_SKIPPED} steps in a row were skipped: some gradient"
            _stop(self.trainer, what, self.trainer.save_last_good())
        bad = _first_bad((name, p) for name, p in model.named_parameters() if p.requires_grad)
        if bad is None:
            return
        if self._before:
            with torch.no_grad():
                for name, value in self._before.items():
                    model.get_parameter(name).copy_(value)
            folder = self.trainer.save_last_good()
        _stop(self.trainer, f"{bad} after the update (learning rate {args.learning_rate:g})", folder)
