"""Contrastive weight steering: a LoRA trained on the chosen answers minus one trained on the rejected answers.

    [adapter]
    type = "lora"
    r = 16                          # each of the two LoRA has rank 8

    [weight_steering]
    steps = 16
    learning_rate = 5e-4

    [trainer]
    max_steps = 0                   # the difference is scaled and not trained further

`ΔW = ΔW_chosen - ΔW_rejected` is a LoRA of twice the rank, and has a strength like every LoRA (2511.05408).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.lora import LoraLayer
from pydantic import Field
from torch import nn

from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.ingredients import ArmLike, Ingredient, Training
from steertune.recipes.lab.ingredients.teachers import TeacherTable, examples_of
from steertune.trainers import Bias
from steertune.trainers.types import SteeringRun


class WeightSteering(Ingredient):
    """`[weight_steering]`: how the two LoRA are trained; the arm's own adapter becomes their difference."""

    order: ClassVar[int] = 45
    refused_by: ClassVar[Mapping[str, str]] = {
        "gradients": "its two LoRA are trained by cross-entropy; remove the table.",
        "distill": "it learns from pairs; use the arm in train, in a grid or in a sweep.",
    }

    steps: int = Field(default=0, ge=0)
    """Training steps of each LoRA."""
    learning_rate: float = Field(default=5e-4, gt=0, allow_inf_nan=False)
    """Learning rate of each LoRA."""

    def __bool__(self) -> bool:
        return self.steps > 0

    def check(self, arm: ArmLike) -> None:
        """Refuse an arm whose adapter cannot hold the difference, or would be trained further."""
        if not self:
            return
        halved = [arm.adapter.get(name, 8) for name in ("r", "lora_alpha")]  # PEFT's defaults
        if arm.adapter.get("type") != "lora" or any(not isinstance(value, int) or value % 2 for value in halved):
            raise ArmError(
                f"[weight_steering] makes a LoRA of an even rank and lora_alpha (got adapter={arm.adapter}): half of "
                'it learns from the chosen answers, half from the rejected ones. Set adapter.type = "lora" and even '
                "numbers."
            )
        if arm.trainer.get("max_steps") != 0:
            raise ArmError("[weight_steering] does not train the difference further. Set trainer.max_steps = 0.")
        if arm.ingredients.get("inductive_biases"):
            raise ArmError("[weight_steering] trains with plain cross-entropy. Remove [inductive_biases].")

    def apply(self, training: Training) -> None:
        """Train the two LoRA, and make the arm's adapter their difference."""
        if not self:
            return
        adapter = training.arm.adapter
        half = {**adapter, "r": adapter.get("r", 8) // 2, "lora_alpha": adapter.get("lora_alpha", 8) // 2}
        changes = {"adapter": half, "trainer": {"max_steps": self.steps, "learning_rate": self.learning_rate}}
        sides = {"chosen": TeacherTable(chosen=""), "rejected": TeacherTable(rejected="")}
        models = [training.train(side, changes, examples_of(training.rows, table)) for side, table in sides.items()]
        training.options["inductive_biases"] = [Difference(*models)]
        training.notes["weight_steering"] = f"Two LoRA of {self.steps} steps each; the adapter is their difference."


@dataclass(frozen=True)
class Difference(Bias):
    """Starts a LoRA of rank 2r as one LoRA of rank r minus another."""

    plus: nn.Module
    minus: nn.Module

    @torch.no_grad()
    def start(self, trainer: SteeringRun) -> None:
        """Write `A = [A₊; A₋]` and `B = [B₊, -B₋]`: `B A = B₊ A₊ - B₋ A₋`."""
        layers: list[dict[str, Any]] = [
            {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
            for model in (trainer.model, self.plus, self.minus)
        ]
        for name, layer in layers[0].items():
            [key] = layer.lora_A
            plus, minus = layers[1][name], layers[2][name]
            layer.lora_A[key].weight.copy_(torch.cat([plus.lora_A[key].weight, minus.lora_A[key].weight]))
            layer.lora_B[key].weight.copy_(torch.cat([plus.lora_B[key].weight, -minus.lora_B[key].weight], dim=1))
