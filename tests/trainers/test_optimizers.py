"""Optimisers as a factor: plain, with momentum, by signs; in units of the stream, against the formula."""

from __future__ import annotations

import pytest
import torch
from tiny_data import pairs, trainer

from steertune.adapters import SteeringVectorConfig
from steertune.adapters.units import unit_of
from steertune.recipes.lab.arm import load_arm

RATE = 0.1
OPTIONS = {
    "vector_sgd_dpo": {},
    "vector_momentum_dpo": {"momentum": 0.9},
    "vector_sign_dpo": {"sign": True},
}


def steps_of(gradients: list[torch.Tensor], momentum: float = 0.0, sign: bool = False) -> torch.Tensor:
    """Where a vector of zeros is after steps along the gradients."""
    v, velocity = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
    for gradient in gradients:
        velocity = momentum * velocity + (gradient.sign() if sign else gradient)
        v = v - RATE * velocity
    return v


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", [None, 4.0], ids=["absolute", "units"])
def test_the_arms_step_as_their_formula_says(name, size, tmp_path):
    arm = load_arm(name)
    settings = {key: arm.trainer[key] for key in ("optim", "optim_args") if key in arm.trainer}
    config = SteeringVectorConfig(layers=2, stream_sizes={} if size is None else {"2": size})
    made = trainer(
        "dpo", tmp_path, data=pairs(4), loss="dpo", max_steps=3, max_grad_norm=0.0, learning_rate=RATE,
        lr_scheduler_type="constant", peft_config=config, **settings,
    )  # fmt: skip
    [parameter] = [p for p in made.model.parameters() if p.requires_grad]
    gradients: list[torch.Tensor] = []
    parameter.register_hook(lambda gradient: gradients.append(gradient.detach().clone()))
    made.train()
    # gradients and steps are those of the vector in its unit
    unit = 1.0 if size is None else unit_of("v", size, parameter.numel(), 1)
    expected = unit * steps_of(gradients, **OPTIONS[name])
    assert len(gradients) == 3 and parameter.detach().norm() > 0
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6 * unit)
