"""Stop when every example has what the loss asks for: the satisficing stop of one-shot optimisation (2502.18862)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class Satisfied(TrainerCallback):
    """Ends the training once a loss that says so (`Needs.stops`) was 0 on every example.

    Of n examples, `2n - 1` in a row hold a whole epoch, whatever its order. A stream has no length and is not stopped.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.met = trainer, 0

    def note(self, values: Tensor) -> None:
        """Count what a micro-batch of this process met."""
        self.met = 0 if values.any() else self.met + len(values)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer event: nothing is met yet."""
        self.met = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer event: the parameters are updated."""
        trainer, rows = self.trainer, self.trainer.train_dataset
        if trainer.loss is None or not trainer.loss.needs.stops or not hasattr(rows, "__len__"):
            return
        everywhere = trainer.accelerator.gather(torch.tensor([self.met], device=args.device))
        met, needed = int(everywhere.min()) * len(everywhere), 2 * len(rows) - 1
        if met >= needed and state.global_step < state.max_steps:
            steps = state.global_step, state.max_steps
            logger.warning("Stopped at step %d of %d: the loss is 0 on all examples.", *steps)
            control.should_training_stop = True
