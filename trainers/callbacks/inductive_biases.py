"""Call inductive biases at each stage of a step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..inductive_biases import Bias
from ..types import SteeringRun


class ApplyBiases(TrainerCallback):
    """Calls inductive biases before every micro-batch and before every optimiser step.

    Args:
        trainer: The trainer.
        inductive_biases: The biases, in their order.
    """

    def __init__(self, trainer: SteeringRun, inductive_biases: list[Bias]) -> None:
        self.trainer, self.inductive_biases = trainer, inductive_biases

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Announce the first micro-batch of a step."""
        for bias in self.inductive_biases:
            bias.before_forward(self.trainer)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Announce another micro-batch of the step."""
        for bias in self.inductive_biases:
            bias.before_forward(self.trainer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the biases change the gradients, which are already clipped."""
        for bias in self.inductive_biases:
            bias.gradients(self.trainer)
