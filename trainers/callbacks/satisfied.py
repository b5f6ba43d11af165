"""Stop when every example satisfies the loss: the satisficing stop of one-shot optimisation (2502.18862)."""

from __future__ import annotations

import logging
from collections.abc import Sized
from typing import Any

import torch

from ..types import SteeringRun
from .base import LossValues, SteeringCallback

logger = logging.getLogger(__name__)


class StopWhenSatisfied(SteeringCallback):
    """Ends the training once a loss that allows it (`Needs.stops`) was 0 on every example.

    Any `2n - 1` examples in a row contain a whole epoch of n, whatever its order. A stream has no length and is not
    stopped.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: SteeringRun) -> None:
        self.trainer = trainer
        self.satisfied = 0  # examples in a row, on this process

    def on_loss_values(self, result: LossValues) -> None:
        """Count the examples of a training micro-batch."""
        if result.loss.needs.stops and result.training:
            self.satisfied = 0 if result.values.detach().any() else self.satisfied + len(result.values)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start counting."""
        self.satisfied = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if the examples in a row, over all processes, contain every example."""
        trainer, rows = self.trainer, self.trainer.train_dataset
        if trainer.loss is None or not trainer.loss.needs.stops or not isinstance(rows, Sized):
            return
        counts = trainer.accelerator.gather(torch.tensor([self.satisfied], device=args.device))
        satisfied, needed = int(counts.min()) * len(counts), 2 * len(rows) - 1
        if satisfied >= needed and state.global_step < state.max_steps:
            steps = state.global_step, state.max_steps
            logger.warning("Stopped at step %d of %d: the loss is 0 on all examples.", *steps)
            control.should_training_stop = True
