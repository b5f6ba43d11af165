"""Three numbers of inductive bias: on toys whose values are known, and on tiny models with planted adapters."""

from __future__ import annotations

import json

import pytest
import tiny_data
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import steered, tiny, vector_of

from steertune.adapters import SteeringVectorConfig
from steertune.adapters.outputs import adding
from steertune.losses import get_loss
from steertune.recipes import cli
from steertune.recipes.lab import inductive_bias as ib
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.files import ArmError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_area_of_a_quadratic_is_exact():
    """L(s) = c + a (1 - s)² over a norm of n has the area n (c + a / 3)."""
    found = ib.efficiency(lambda scale: 0.5 + 3.0 * (1 - scale) ** 2, norm=2.0)
    assert found.area == pytest.approx(2.0 * (0.5 + 3.0 / 3))
    assert found.losses[0] == 3.5 and found.losses[-1] == 0.5


def test_noise_is_orthogonal_and_as_long_as_the_parameter():
    parameter = torch.randn(40, generator=generator(1))
    noise = ib.orthogonal_noise(parameter, generator())
    assert float(noise @ parameter) == pytest.approx(0.0, abs=1e-4)
    assert float(noise.norm()) == pytest.approx(float(parameter.norm()), rel=1e-5)


def test_the_rise_on_a_bowl_is_the_square_of_the_noise():
    """L = k |θ - θ*|² at θ* rises by k (size |θ*|)², whatever the direction."""
    parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0, 0.0]))
    target = parameter.detach().clone()
    found = ib.stability([parameter], lambda: float(2.0 * (parameter - target).square().sum()), generator())
    expected = [2.0 * (size * 5.0) ** 2 for size in ib.SIZES]
    assert found.losses == pytest.approx(expected, rel=1e-5) and found.loss == 0.0
    assert found.rise == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert torch.equal(parameter.detach(), target), "the noise is taken away again"


def test_a_direction_that_the_loss_does_not_see_costs_nothing():
    parameter = torch.nn.Parameter(torch.tensor([2.0, 0.0, 0.0]))
    found = ib.stability([parameter], lambda: float(parameter[0] ** 2), generator())
    assert found.rise == pytest.approx(0.0, abs=1e-6)


def test_noise_on_an_untrained_vector_is_refused():
    with pytest.raises(ArmError, match="zero"):
        ib.stability([torch.zeros(4)], lambda: 0.0, generator())


def test_the_training_loss_is_the_trainer_s(tmp_path):
    """With the solution as it is, and scaled away, it is what the trainer evaluates."""
    data = tiny_data.pairs(6)
    made = tiny_data.trainer(
        "dpo", tmp_path, data=data, loss="cross_entropy", eval_dataset=data, per_device_eval_batch_size=6,
        peft_config=SteeringVectorConfig(layers=2), max_steps=4, learning_rate=0.1,
    )  # fmt: skip
    shown = batches(tiny_data.tokenizer(), data, 4)
    made.train()
    model, loss = made.model.eval(), get_loss("cross_entropy")
    with torch.no_grad():
        values = {scale: ib.training_loss(model, shown, loss, scale) for scale in (0.0, 1.0)}
    assert values[1.0] == pytest.approx(made.evaluate()["eval_loss"], rel=1e-4)
    vector_of(model).data.zero_()
    assert values[0.0] == pytest.approx(made.evaluate()["eval_loss"], rel=1e-4)


def test_the_norm_is_of_the_vectors_or_of_the_changed_weights():
    model = steered(layers=[1, 2])
    vectors = [p for name, p in model.named_parameters() if "steering_vector_v" in name]
    assert ib.parameter_norm(model) == pytest.approx(sum(float(v.square().sum()) for v in vectors) ** 0.5)
    lora = get_peft_model(tiny(), LoraConfig(r=2, lora_alpha=6, target_modules=["down_proj"], layers_to_transform=[1]))
    weights = {name: p for name, p in lora.named_parameters() if "lora_" in name}
    for parameter in weights.values():
        torch.nn.init.normal_(parameter)
    [a], [b] = ([p for name, p in weights.items() if kind in name] for kind in ("lora_A", "lora_B"))
    assert ib.parameter_norm(lora) == pytest.approx(float((3.0 * b @ a).norm()), rel=1e-5)


@pytest.fixture(scope="module")
def strong():
    """A direction at layer 2 that changes the tiny model's predictions most: by power iteration on the KL of moves."""
    rows = tiny_data.demonstrations(8)
    shown = batches(tiny_data.tokenizer(), rows, 4)
    model = steered(layers=2)
    vector = vector_of(model)
    torch.nn.init.normal_(vector, std=0.02)
    for _ in range(20):  # gradient of KL is the Fisher matrix times the move
        vector.grad = None
        for batch in shown:
            logps = ib._logps(model, batch)
            with torch.no_grad(), ib.scaled(model, 0.0):
                base = ib._logps(model, batch)
            (logps.exp() * (logps - base)).sum().backward()
        vector.data = 0.1 * vector.grad / vector.grad.norm()
    return shown, vector.data.clone()


def test_a_random_direction_is_not_significant_and_a_real_one_is(strong):
    shown, direction = strong
    model = steered(layers=2)
    ratios = {}
    for name, vector in {"real": direction, "random": torch.randn(32, generator=generator(5))}.items():
        vector_of(model).data = 0.1 * vector / vector.norm()
        with torch.no_grad():
            ratios[name] = ib.significance(model, shown, generator(2))
    assert ratios["real"].p == 1 / (1 + ib.RANDOM) and ratios["real"].ratio > 2
    assert ratios["random"].p > 0.1 and 0.4 < ratios["random"].ratio < 2.5


def test_random_directions_move_the_stream_as_far_as_the_adapter(strong):
    """A constant vector against itself: the random move replaced by its own direction has its KL."""
    shown, direction = strong
    model = steered(layers=2)
    vector_of(model).data = direction
    with torch.no_grad():
        expected = ib._logps(model, shown[0])
        length = direction.norm().expand(*shown[0].labels.shape, 1)
        with ib.scaled(model, 0.0), adding(ib.top_block(model), length * direction / direction.norm()):
            torch.testing.assert_close(ib._logps(model, shown[0]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["vector", "lora"])
def test_info_prints_them(kind, tmp_path, capsys):
    base = tiny()
    tiny_data.save_model(tmp_path / "base")
    tiny_data.save_task(tmp_path, train=tiny_data.pairs(6, 5), test=tiny_data.pairs(6, 4))
    if kind == "vector":
        model = steered(base, layers=2)
    else:
        model = get_peft_model(base, LoraConfig(target_modules=["down_proj"], init_lora_weights=False))
    model.save_pretrained(str(tmp_path / "adapter"))
    words = ["info", str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), "--data", str(tmp_path)]
    capsys.readouterr()  # what libraries print when they are imported
    assert cli.main([*words, "--rows", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name.partition(",")[0] for name in found["inductive bias"]} == {"efficiency", "stability", "significance"}
    assert found["norm of the parameters"] > 0 and 0 < found["p of a random direction"] <= 1
    by_share = found["cross_entropy by share of the solution"]
    area = found["inductive bias"]["efficiency, area under the loss"]
    assert min(by_share.values()) <= area / found["norm of the parameters"] <= max(by_share.values())
    assert cli.main([*words, "--rows", "4", "--loss", "dop"]) == 2
    assert "dpo" in capsys.readouterr().err
    assert cli.main([*words, "--rows", "4", "--loss", "prompted"]) == 2
    assert "views" in capsys.readouterr().err
