"""Events of a training that `TrainerCallback` does not have."""

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
    """What a loss gave for a micro-batch.

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
    """A callback with the further events of our trainers, which call it like any other."""

    def before_train(self, trainer: SteeringRun) -> None:
        """Initial vectors are computed; no checkpoint is loaded and no optimiser made."""

    def on_loss_values(self, result: LossValues) -> None:
        """A loss of ours was computed, in training or evaluation."""

    def on_micro_step(self, losses: Tensor) -> None:
        """A micro-batch's gradients were added.

        Args:
            losses: The micro-batch's loss on every process, `(processes,)`.
        """

    def extra_logs(self) -> dict[str, float]:
        """Numbers to log beside the training loss."""
        return {}
