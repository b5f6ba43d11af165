"""Contrastive weight steering: one LoRA minus another, as an arm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tiny_data import pairs, tokenizer
from tiny_models import tiny

from steertune.recipes.lab.arm import load_arm, make_arm
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.training import QUIET, fit, make_trainer, training_of
from steertune.trainers import ModelAt

LORA = {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
ARM: dict[str, Any] = {
    "name": "difference",
    "data": {"name": "nowhere"},
    "adapter": LORA,
    "weight_steering": {"steps": 6, "learning_rate": 0.02},
    "trainer": {"max_steps": 0, "per_device_train_batch_size": 4},
}


def updates(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a LoRA adds to every weight."""
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def test_the_adapter_is_the_difference_of_two_trainings(tmp_path):
    data, parts = pairs(6), []
    training = training_of(make_arm(ARM), tiny(), tokenizer(), data, tmp_path)
    train = training.train
    training.train = lambda *args: parts.append(train(*args)) or parts[-1]
    trainer = make_trainer(training, **QUIET)
    fit(trainer, tmp_path)
    whole, plus, minus = (updates(model) for model in (trainer.model, *parts))
    for name, update in whole.items():
        torch.testing.assert_close(update, plus[name] - minus[name], rtol=1e-4, atol=1e-6)
    assert any(update.norm() > 0 for update in plus.values())
    # planted: the pair says which way the margin must go, and the strength how far
    margins = {}
    for strength in (-1.0, 0.0, 1.0):
        at = [ModelAt(trainer.model, trainer.model, batch)(strength) for batch in batches(tokenizer(), data, 6)]
        margins[strength] = float((at[0].chosen.logps - at[0].rejected.logps).mean())
    assert margins[-1.0] < margins[0.0] < margins[1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": {**LORA, "r": 3}}, "even rank"),
        ({"adapter": {**LORA, "lora_alpha": 3}}, "even rank"),
        ({"adapter": {"type": "steering_vector"}}, "even rank"),
        ({"trainer": {"max_steps": 4}}, r"max_steps = 0"),
        ({"inductive_biases": {"rank_one": {}}}, r"Remove \[inductive_biases\]"),
        ({"weight_steering": {"steps": -1}}, "steps"),
    ],
)
def test_arms_that_contradict_it_are_refused(change, message):
    with pytest.raises(ArmError, match=message):
        make_arm({**ARM, **change})


def test_the_shipped_arm_is_checked_by_the_recipes_that_cannot_use_it():
    assert load_arm("lora_weight_steering", recipe="train").adapter["r"] == 16
    with pytest.raises(ArmError, match="learns from pairs"):
        load_arm("lora_weight_steering", recipe="distill")
