"""`form="span"` trains coefficients of existing vectors, and `norm="learned"` a length beside a direction."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_data import pairs, trained, trainer
from tiny_models import tiny

from steertune.adapters import SteeringVectorConfig, set_strength, steering_layers
from steertune.adapters.analysis.arithmetic import read
from steertune.adapters.exports._vectors import adapter_of, constant_vectors
from steertune.adapters.units import STEP_SHARE
from steertune.recipes.sweeping.sources import bake

LAYER, WIDTH = 1, 32
IDS = torch.arange(6)[None] + 7


def zoo(folder: Path, count: int = 3, layer: int = LAYER) -> tuple[str, torch.Tensor]:
    """A folder of saved vectors, and the vectors `(count, d)`."""
    rows = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3))
    for i, row in enumerate(rows):
        adapter_of(tiny(), {layer: row}).save_pretrained(str(folder / f"v{i}"))
    return str(folder), rows


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def the_layer(model):
    [layer] = steering_layers(model)
    return layer


@pytest.mark.parametrize("strength", [1.0, -2.0])
def test_a_span_steers_like_the_weighted_sum(strength, tmp_path):
    folder, rows = zoo(tmp_path)
    model = get_peft_model(tiny(), SteeringVectorConfig(form="span", basis=folder, layers=LAYER)).eval()
    assert torch.equal(logits(model), logits(tiny())), "it starts at zero"
    c = torch.tensor([0.5, -1.0, 2.0])
    the_layer(model).parameter("default", "v").data.copy_(c)
    plain = adapter_of(tiny(), {LAYER: sum(float(a) * row for a, row in zip(c, rows, strict=True))}).eval()
    for steered in (model, plain):
        set_strength(steered, strength)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    assert torch.allclose(constant_vectors(model).by_layer[LAYER], c @ rows, atol=1e-5)


def test_only_the_coefficients_are_trained_and_everything_is_saved(tmp_path):
    folder, rows = zoo(tmp_path / "zoo")
    config = SteeringVectorConfig(form="span", basis=folder, layers=LAYER)
    made = trained("dpo", tmp_path / "run", data=pairs(4), loss="dpo", peft_config=config)
    [c] = [p for p in made.model.parameters() if p.requires_grad]
    assert c.shape == (3,) and c.detach().abs().min() > 0
    assert torch.equal(the_layer(made.model).parameter("default", "w"), rows)
    made.model.save_pretrained(str(tmp_path / "span"))
    again = PeftModel.from_pretrained(tiny(), str(tmp_path / "span")).eval()
    assert torch.equal(logits(again), logits(made.model.eval()))
    torch.testing.assert_close(read(tmp_path / "span").vectors[LAYER], c.detach() @ rows)


def test_a_step_of_a_coefficient_moves_the_vector_as_far_as_a_step_of_its_length(tmp_path):
    folder, rows = zoo(tmp_path)
    config = SteeringVectorConfig(form="span", basis=folder, layers=LAYER, stream_sizes={str(LAYER): 5.0})
    layer = the_layer(get_peft_model(tiny(), config))
    unit = layer.steering_vector_v["default"].unit
    assert unit * float(rows.norm(dim=1).median()) == pytest.approx(STEP_SHARE * 5.0)
    assert layer.steering_vector_w["default"].unit is None


def test_a_span_finds_a_planted_vector_that_lies_in_it(tmp_path):
    folder, rows = zoo(tmp_path)
    model = get_peft_model(tiny(), SteeringVectorConfig(form="span", basis=folder, layers=LAYER))
    the_layer(model).initialise("default", 2 * rows[0] - rows[2])
    c = the_layer(model).parameter("default", "v").detach()
    torch.testing.assert_close(c, torch.tensor([2.0, 0.0, -1.0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a basis"),
        ({"basis": "nowhere"}, "holds no adapter folder"),
        ({"layers": 2, "basis": "zoo"}, "steers layers"),
    ],
)
def test_bases_that_cannot_be_used_are_named(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zoo(tmp_path / "zoo")
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny(), SteeringVectorConfig(form="span", **{"layers": LAYER, **options}))
    with pytest.raises(ValueError, match="has no basis"):
        SteeringVectorConfig(basis="zoo")
    with pytest.raises(ValueError, match="not for form='span'"):
        SteeringVectorConfig(form="span", norm="fixed", norm_value=1.0, init="random")


def learned(**options) -> SteeringVectorConfig:
    return SteeringVectorConfig(layers=LAYER, norm="learned", init="random", **options)


def test_a_learned_length_starts_as_the_free_vector_and_scales_the_direction():
    model = get_peft_model(tiny(), learned(init_scale=3.0)).eval()
    layer = the_layer(model)
    u, s = layer.parameter("default", "v").data, layer.parameter("default", "b").data
    torch.testing.assert_close(layer.written("default").detach(), u)
    assert float(s) == pytest.approx(3.0, rel=1e-5)
    s.fill_(-0.5)
    torch.testing.assert_close(layer.written("default").detach(), -0.5 * u / u.norm())


def test_gradients_of_direction_and_length_are_those_of_the_formula():
    layer = the_layer(get_peft_model(tiny(), learned(stream_sizes={})))
    target = torch.randn(WIDTH)
    (layer.written("default") @ target).backward()
    u = layer.parameter("default", "v")
    unit = u.detach() / u.detach().norm()
    torch.testing.assert_close(layer.parameter("default", "b").grad, (target @ unit)[None])
    # a change along the direction itself is the length's alone
    torch.testing.assert_close(u.grad, target - (target @ unit) * unit, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rate", [1.0, 4.0])
def test_the_length_has_a_rate_of_its_own(rate, tmp_path):
    config = learned(length_rate=rate, stream_sizes={str(LAYER): 2.0}, init_scale=0.1)
    made = trainer("dpo", tmp_path, data=pairs(4), loss="dpo", peft_config=config, max_steps=1, learning_rate=1e-3)
    before = the_layer(made.model).parameter("default", "b").item()
    made.train()
    moved = abs(the_layer(made.model).parameter("default", "b").item() - before)
    # AdamW's first step is the learning rate, whatever the gradient
    assert moved == pytest.approx(1e-3 * rate * STEP_SHARE * 2.0, rel=0.01)


def test_a_learned_length_is_saved_scaled_and_read(tmp_path):
    made = trained("dpo", tmp_path / "run", data=pairs(4), loss="dpo", peft_config=learned())
    made.model.save_pretrained(str(tmp_path / "learned"))
    expected = the_layer(made.model).written("default").detach()
    torch.testing.assert_close(read(tmp_path / "learned").vectors[LAYER], expected)
    again = PeftModel.from_pretrained(tiny(), str(tmp_path / "learned"))
    bake(again, 2.0)
    torch.testing.assert_close(the_layer(again).written("default").detach(), 2 * expected)


def test_a_learned_length_needs_a_direction_and_one_vector():
    with pytest.raises(ValueError, match="needs a direction to start from"):
        SteeringVectorConfig(norm="learned")
    with pytest.raises(ValueError, match="defined for form='bias'"):
        SteeringVectorConfig(norm="learned", init="random", form="gated")
    with pytest.raises(ValueError, match="trains no length"):
        SteeringVectorConfig(length_rate=2.0)
    with pytest.raises(ValueError, match="above 0"):
        learned(length_rate=0.0)
