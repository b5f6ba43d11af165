"""A LoRA that is trained jointly with a vector, with and without orthogonality."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tiny_data import pairs, trainer
from tiny_models import tiny

from steertune.adapters import SteeringVectorConfig, steering_layers
from steertune.recipes.lab.arm import load_arm
from steertune.recipes.lab.files import ArmError
from steertune.trainers import BiasError
from steertune.trainers.batch import Batch
from steertune.trainers.inductive_biases.beside_lora import writes
from steertune.trainers.model_at import ModelAt

LAYER = 2


def made(folder, orthogonal=False, config=None, **options):
    biases = {"beside_lora": {"r": 2, "orthogonal": orthogonal}}
    config = config or SteeringVectorConfig(layers=LAYER)
    return trainer(
        "dpo", folder, data=pairs(4), loss="dpo", peft_config=config, inductive_biases=biases, max_steps=4, **options
    )


def vector(model) -> torch.Tensor:
    [layer] = steering_layers(model)
    return layer.written("default").detach()


def along(model) -> list[float]:
    """How much of what each map of the LoRA writes lies along the vector."""
    v = vector(model)
    return [float((v @ b).norm() / (v.norm() * b.norm())) for b in writes(model)]


@pytest.mark.parametrize("orthogonal", [False, True])
def test_both_are_trained_and_the_base_is_not(orthogonal, tmp_path):
    ours = made(tmp_path, orthogonal)
    ours.train()
    assert vector(ours.model).norm() > 0 and len(writes(ours.model)) == 8
    assert all(b.detach().norm() > 0 for b in writes(ours.model))
    base = dict(tiny().named_parameters())
    for name, parameter in ours.model.get_base_model().named_parameters():
        plain = name.replace(".base_layer", "")
        assert plain not in base or torch.equal(parameter, base[plain]), name
    if orthogonal:
        assert max(along(ours.model)) < 1e-5
    else:
        assert max(along(ours.model)) > 1e-2, "the test could not tell"


def test_a_strength_scales_both_and_zero_is_the_base(tmp_path):
    ours = made(tmp_path)
    batch = Batch.read(next(iter(ours.get_train_dataloader())))
    ours.train()
    ours.model.eval()
    at = ModelAt(ours.model, ours.model, batch)
    base = tiny()
    expected = ModelAt(base, base, batch)(1.0).logps
    torch.testing.assert_close(at(0.0).logps, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(at(1.0).logps, expected, atol=1e-3)
    half = at(0.5).logps.detach().clone()
    # by hand: half of the vector, and half of every LoRA
    [layer] = steering_layers(ours.model)
    with torch.no_grad():
        layer.parameter("default", "v").mul_(0.5)
        for module in ours.model.modules():
            if isinstance(module, LoraLayer):
                module.lora_B["default"].weight.mul_(0.5)
    by_hand = ModelAt(ours.model, ours.model, batch)(1.0).logps
    torch.testing.assert_close(half, by_hand.detach(), rtol=1e-5, atol=1e-5)


def test_what_would_be_lost_is_refused(tmp_path):
    with pytest.raises(BiasError, match="checkpoints would lack the LoRA"):
        made(tmp_path, save_strategy="steps").train()
    ours = made(tmp_path)
    ours.train()
    with pytest.raises(BiasError, match="cannot be saved"):
        ours.model.save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(BiasError, match="one steering vector"):
        made(tmp_path, config=SteeringVectorConfig(layers="all")).train()
    with pytest.raises(ValueError, match="r=0"):
        trainer("dpo", tmp_path, loss="dpo", inductive_biases={"beside_lora": {"r": 0}})
    load_arm("vector_and_lora_dpo")
    for recipe in ("train", "sweep", "distill"):
        with pytest.raises(ArmError, match="use the arm in a grid"):
            load_arm("vector_and_lora_dpo", recipe=recipe)
