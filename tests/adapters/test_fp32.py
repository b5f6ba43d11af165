"""Vectors are trained in fp32, whoever trains them and whatever cast them to half precision before."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from tiny_data import demonstrations, pairs, tokenizer
from tiny_models import quantised_tiny, steered, tokens, vector_of
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from steertune.adapters import SteeringVectorConfig

STOCK = {"sft": (SFTTrainer, SFTConfig, demonstrations), "dpo": (DPOTrainer, DPOConfig, pairs)}


@pytest.fixture(scope="module", params=[4, 8])
def quantised(request, tmp_path_factory):
    return quantised_tiny(request.param, tmp_path_factory.mktemp("base"))


def stock(kind: str, home, model, learning_rate: float = 1e-4, **options):
    cls, arguments, data = STOCK[kind]
    args = arguments(
        str(home), max_steps=4, per_device_train_batch_size=2, learning_rate=learning_rate, report_to=[],
        lr_scheduler_type="constant", bf16=False, optim="adamw_torch", **options,
    )  # fmt: skip
    return cls(model, args=args, train_dataset=data(8), processing_class=tokenizer())


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("switches", [{"init": "random", "init_scale": 8.0}, {"form": "gated", "init": "random"}])
def test_stock_trainers_on_a_quantised_base_train_fp32(kind, switches, quantised, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(quantised(), SteeringVectorConfig(layers=[1, 2], **switches))
    before = vector_of(model).detach().clone()
    trainer = stock(kind, tmp_path, model)
    assert vector_of(model).dtype == torch.bfloat16, "TRL has stopped casting: nothing is restored any more"
    trainer.train()
    vectors = [p for name, p in model.named_parameters() if "steering_vector_" in name]
    assert all(p.dtype == torch.float32 for p in vectors)
    moved = (vector_of(model) - before).abs()
    assert (moved > 0).all() and moved.max() < 1e-3, "smaller steps than bf16 can take near 1, from the exact start"
    model.save_pretrained(tmp_path / "adapter")


def test_steps_are_those_of_a_trainer_that_casts_nothing(quantised, tmp_path, monkeypatch):
    """The restored parameter is the one that the optimiser has."""
    made = {}
    for restored in (True, False):
        torch.manual_seed(0)
        model = get_peft_model(quantised(), SteeringVectorConfig(init="random"))
        trainer = stock("sft", tmp_path, model)
        if not restored:
            trainer = stock("sft", tmp_path, model)
            vector_of(model).data = (
                trainer.model.base_model.model.model.layers[2].steer.steering_vector_v["default"].exact.clone()
            )
        trainer.train()
        made[restored] = vector_of(model).detach()
    torch.testing.assert_close(made[True], made[False], rtol=0, atol=0)


CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to": lambda model: model.to(torch.bfloat16),
    "data": lambda model: [setattr(p, "data", p.data.bfloat16()) for p in model.parameters()],
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("early", [True, False], ids=["optimiser first", "optimiser last"])
def test_a_cast_model_trains_fp32_vectors(cast, early):
    model = steered(init="random", init_scale=4.0, stream_sizes={})
    vector_of(model).data.copy_(torch.full((32,), 2.0))
    vector = vector_of(model)
    if early:
        optimiser = torch.optim.AdamW([vector], lr=1e-3, weight_decay=0.0)
    CASTS[cast](model)
    model.train()
    if not early:
        optimiser = torch.optim.AdamW([vector_of(model)], lr=1e-3, weight_decay=0.0)
    for _ in range(20):
        (0.0 * model(input_ids=tokens()).logits.float().sum() + vector_of(model).sum()).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert vector_of(model) is vector and vector.dtype == torch.float32
    assert vector.mean().item() == pytest.approx(2.0 - 0.02, abs=1e-4)


def test_a_frozen_vector_keeps_the_precision_it_was_given():
    """It is not trained, and a cast for inference is a choice."""
    model = steered().to(torch.bfloat16)
    vector_of(model).requires_grad_(False)
    model.train()
    assert vector_of(model).dtype == torch.bfloat16


_ONE_PROCESS_GROUP = """
import sys; sys.path.insert(0, "tests/helpers")
import tiny_data, torch
from tiny_models import steered
torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method="tcp://127.0.0.1:0")
model = steered().to(torch.bfloat16)
try:
    model.train()
except RuntimeError as error:
    print(error)
"""


def test_several_processes_are_refused_by_name():
    """Buckets of DistributedDataParallel cannot change their type."""
    done = subprocess.run([sys.executable, "-c", _ONE_PROCESS_GROUP], capture_output=True, text=True, timeout=120)
    assert "cast to torch.bfloat16 before training in several processes" in done.stdout, done.stderr
