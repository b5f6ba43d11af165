"""Ours beside the stock trainers, over generated combinations of options (see `differential.py`)."""

from __future__ import annotations

import pytest
import torch
from differential import draw, problem
from tiny_data import losses, trained, values

from steertune.adapters import SteeringVectorConfig


def wrong(seeds: range, folder) -> tuple[list[str], int]:
    """The cases that went wrong, and how many were refused."""
    found = {seed: problem(draw(seed), folder / str(seed)) for seed in seeds}
    bad = [f"{seed}: {what} ({draw(seed)})" for seed, what in found.items() if what not in (None, "refused")]
    return bad, sum(what == "refused" for what in found.values())


@pytest.mark.parametrize("block", [0, 1, 2, *(pytest.param(block, marks=pytest.mark.slow) for block in (3, 4, 5))])
def test_ours_equals_the_stock_trainer_or_refuses_by_name(block, tmp_path):
    bad, refused = wrong(range(8 * block, 8 * block + 8), tmp_path)
    assert bad == [] and refused < 8


@pytest.mark.parametrize("positions", ["completion", "prompt", "last_prompt"])
@pytest.mark.parametrize("loss", ["dpo", "cross_entropy"])
def test_blocks_computed_again_steer_the_same_tokens(loss, positions, tmp_path):
    """The reference, whose rows are computed one by one, comes between a policy's forward and backward pass."""
    config = SteeringVectorConfig(site="attention", layers="all", positions=positions)
    options = dict(loss=loss, peft_config=config, per_device_train_batch_size=2)
    plain, again = (trained("dpo", tmp_path, gradient_checkpointing=on, **options) for on in (False, True))
    assert losses(again) == pytest.approx(losses(plain), rel=1e-6)
    for name, value in values(plain.model).items():
        torch.testing.assert_close(values(again.model)[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_ours_equals_the_stock_trainer_in_many_more(block, tmp_path):
    bad, refused = wrong(range(1000 + 20 * block, 1020 + 20 * block), tmp_path)
    assert bad == [] and refused < 14
