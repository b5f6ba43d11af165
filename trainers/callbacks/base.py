"""Training events that `TrainerCallback` does not have."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import TrainerCallback

from ...losses import Loss
from ..batch import Batch
from ..model_at import ModelAt
from ..types import SteeringRun


@dataclass(frozen=True)
class LossValues:
    """The result of a loss on a micro-batch.

    Attributes:
        loss: The loss.
        values: One value per example or labelled token.
        at: The model's outputs on the batch.
        batch: The batch.
        training: Whether the model is in training mode.
    """

    loss: Loss
    values: Tensor
    at: ModelAt
    batch: Batch
    training: bool


class SteeringCallback(TrainerCallback):
    """A callback with additional events, which our trainers call. Otherwise it is an ordinary callback."""

    def before_train(self, trainer: SteeringRun) -> None:
        """Called after the initial vectors are computed, before a checkpoint is loaded or an optimiser is created."""

    def on_loss_values(self, result: LossValues) -> None:
        """Called after a loss of ours was computed, in training or evaluation."""

    def on_micro_step(self, losses: Tensor) -> None:
        """Called after the gradients of a micro-batch were added.

        Args:
            losses: The micro-batch's loss on every process, `(processes,)`.
        """

    def extra_logs(self) -> dict[str, float]:
        """Numbers to log with the training loss."""
        return {}
