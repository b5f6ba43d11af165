"""Several samples in one row: every sample has its own prompt in stock trainers; ours refuse by name."""

from __future__ import annotations

import pytest
import tiny_data
import torch
from datasets import Dataset
from peft import get_peft_model
from tiny_data import tokenizer
from tiny_models import fill, tiny
from trl import SFTConfig, SFTTrainer

from steertune.adapters import SteeringVectorConfig
from steertune.trainers import SteeringSFTTrainer

POSITIONS = ["all", "completion", "prompt", "last_prompt"]
PACKINGS = {
    "padding-free": {"padding_free": True, "max_length": None},
    "best fit": {"packing": True, "max_length": 64},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 64},
}


def prompted() -> Dataset:
    say = tiny_data._speaker(3)
    return Dataset.from_list([dict(prompt=say(3 + i % 3) + " ", completion=say(2 + i % 4)) for i in range(8)])


def trainer(cls, home, positions: str, data: Dataset, **switches):
    model = get_peft_model(tiny(max_position_embeddings=128), SteeringVectorConfig(layers=1, positions=positions))
    fill(model)
    args = SFTConfig(
        str(home), per_device_train_batch_size=8, max_steps=1, learning_rate=0.0, bf16=False, report_to=[],
        gradient_checkpointing=False, **switches,
    )  # fmt: skip
    return cls(model, args=args, train_dataset=data, processing_class=tokenizer())


def first_loss(*args, **switches) -> float:
    one = trainer(SFTTrainer, *args, **switches)
    one.train()
    return one.state.log_history[-1]["train_loss"]


@pytest.mark.parametrize("packing", ["padding-free", "best fit"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_stock_sft_on_packed_rows_has_the_loss_of_single_rows(positions, packing, tmp_path):
    expected = first_loss(tmp_path, positions, prompted())
    assert first_loss(tmp_path, positions, prompted(), **PACKINGS[packing]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
def test_stock_sft_on_wrapped_rows_steers_by_their_labels(positions, tmp_path):
    one = trainer(SFTTrainer, tmp_path, positions, prompted(), **PACKINGS["wrapped"])
    batch = next(iter(one.get_train_dataloader()))
    steered = []
    layer = one.model.get_base_model().model.layers[1]
    layer.register_forward_hook(lambda module, args, output: steered.append(output - plain[0]))
    plain = []
    layer.steer.register_forward_pre_hook(lambda module, args: plain.append(args[0]))
    one.model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False)
    moved, labelled = steered[0].norm(dim=-1) > 1e-3, batch["labels"] != -100
    later = labelled.flip(1).cummax(dim=1).values.flip(1)  # what comes after the last label predicts none
    prompt = ~labelled
    expected = {
        "all": torch.ones_like(labelled),
        "completion": labelled,
        "prompt": prompt,
        "last_prompt": prompt & labelled.roll(-1, dims=1),
    }[positions]
    assert torch.equal(moved[later], expected[later])


@pytest.mark.parametrize("packing", ["padding-free", "best fit"])
def test_packed_text_without_prompts_is_refused(packing, tmp_path):
    say = tiny_data._speaker(3)
    data = Dataset.from_list([dict(text=say(5 + i % 4)) for i in range(8)])
    with pytest.raises(ValueError, match="prompt of one token looks like an empty one"):
        first_loss(tmp_path, "completion", data, **PACKINGS[packing])
    first_loss(tmp_path, "all", data, **PACKINGS[packing])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("loss", [None, "cross_entropy"])
def test_ours_refuse_packing_by_name(loss, packing, tmp_path):
    name = "padding_free=False" if packing == "padding-free" else "packing=False"

    def ours(*args, **kwargs):
        return SteeringSFTTrainer(*args, loss=loss, **kwargs)

    with pytest.raises(ValueError, match=f"positions='completion' needs one prompt in a row, but .*Set {name}"):
        trainer(ours, tmp_path, "completion", prompted(), **PACKINGS[packing])
    if packing != "wrapped":
        trainer(ours, tmp_path, "all", prompted(), **PACKINGS[packing])
