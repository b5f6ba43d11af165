"""What a run that stops says: the loss, the layer and the rows; and what it leaves. Loss spikes."""

from __future__ import annotations

import logging
import math
import os
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny_data import demonstrations, pairs, tokenizer, trained, trainer, values
from tiny_models import tiny, vector_of
from transformers import TrainerCallback, TrainerControl

from steertune.adapters import SteeringVectorConfig
from steertune.losses import Loss, Needs
from steertune.trainers import LossSpikeError, LossSpikes, NonFiniteError
from steertune.trainers.callbacks import finite

BAD_WORD = "stay"


def poisoned(block: int | None, word: str = BAD_WORD, value: float = math.inf):
    """A model whose block `block` breaks on rows that hold `word` (None: whose word embedding is broken)."""
    model, token = tiny(), tokenizer().convert_tokens_to_ids(word)
    if block is None:
        model.get_input_embeddings().weight.data[token] = value
        return model
    ids = {}
    model.model.register_forward_pre_hook(lambda m, a, k: ids.update(now=k["input_ids"]), with_kwargs=True)

    def hook(module, args, output):
        rows = (ids["now"] == token).any(dim=1)
        return output.masked_fill(rows[:, None, None], value)

    model.model.layers[block].register_forward_hook(hook)
    return model


def one_bad_row(kind: str):
    """Data of which one row, number 5, holds the word."""
    data = (demonstrations if kind == "sft" else pairs)(8, seed=3).to_list()
    data = [{column: text.replace(BAD_WORD, "we") for column, text in row.items()} for row in data]
    for row in data if kind != "sft" else ():
        row["rejected"] += " now"  # chosen and rejected stay different
    data[5]["prompt"] += f"{BAD_WORD} "
    return Dataset.from_list(data)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("kind", "loss"), [("sft", None), ("dpo", None), ("dpo", "dpo"), ("plain", "bipo")])
def test_the_block_and_the_row_are_named(kind, loss, accumulation, tmp_path):
    made = trainer(
        kind, tmp_path, model=poisoned(2), data=one_bad_row(kind), loss=loss, frozen_prefix=False, max_steps=8,
        per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    with pytest.raises(NonFiniteError) as error:
        made.train()
    message = str(error.value)
    assert "the output of model.layers.2 of row 5 (" in message
    assert message.count(" of row ") == 1, message
    assert BAD_WORD in message
    assert ("The loss DPO" if loss == "dpo" else "The loss") in message
    assert all(torch.isfinite(p).all() for p in values(made.model).values())


def test_a_broken_weight_is_named(tmp_path):
    made = trainer("dpo", tmp_path, model=poisoned(None), data=one_bad_row("dpo"), loss="dpo", max_steps=8)
    with pytest.raises(
        NonFiniteError, match=r"embed_tokens\.weight itself holds NaN.*output of model.embed_tokens of row 5"
    ):
        made.train()


def test_all_rows_are_counted_and_few_are_named(tmp_path):
    model = tiny()
    model.lm_head.weight.data[7, 0] = torch.inf
    made = trainer("dpo", tmp_path, model=model, loss="dpo", per_device_train_batch_size=8)
    with pytest.raises(NonFiniteError, match=r"the output of lm_head of row .*, and 4 more\."):
        made.train()


def test_a_gradient_that_overflows_is_named_with_its_layer(tmp_path):
    """Infinite behind a finite loss: the parameter nearest to the loss, where backward met it first."""

    class Blow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.inf

    model = tiny()
    model.model.layers[2].register_forward_hook(lambda m, a, out: Blow.apply(out))
    config = SteeringVectorConfig(layers=[0, 1, 3])
    made = trainer("dpo", tmp_path, model=model, loss="dpo", peft_config=config, frozen_prefix=False)
    with pytest.raises(
        NonFiniteError, match=r"The gradient of .*layers\.0.*First in the gradient of .*layers\.1\."
    ) as e:
        made.train()
    assert "row" in str(e.value)


class Overflow(TrainerCallback):
    """Makes the optimiser's update overflow at some step."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] = 1e39  # beyond fp32


@pytest.mark.parametrize(
    "config", [SteeringVectorConfig(), LoraConfig(r=2, target_modules=["q_proj"])], ids=["vector", "lora"]
)
def test_an_update_that_overflows_is_taken_back(config, tmp_path):
    straight = trained(
        "dpo", tmp_path / "straight", loss="dpo", peft_config=config, max_steps=2, lr_scheduler_type="constant"
    )
    made = trainer("dpo", tmp_path, loss="dpo", peft_config=config, max_steps=5, lr_scheduler_type="constant")
    made.add_callback(Overflow(2))
    with pytest.raises(NonFiniteError, match=r"after the update.*at step 3.*state after step 2 is saved in") as error:
        made.train()
    assert "layers." in str(error.value)
    saved = load_file(tmp_path / "last-good" / "adapter_model.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())
    kept = PeftModel.from_pretrained(tiny(), tmp_path / "last-good", is_trainable=True)
    expected = values(straight.model)
    assert all(torch.equal(value, expected[name]) for name, value in values(kept).items())


@pytest.mark.parametrize("saves", [True, False])
def test_full_finetuning_points_to_its_last_checkpoint(saves, tmp_path):
    made = trainer(
        "sft", tmp_path, loss="cross_entropy", peft_config=None, save_strategy="steps" if saves else "no", save_steps=1
    )
    made.add_callback(Overflow(2))
    where = r"checkpoint-2\." if saves else "lost: no checkpoint was saved"
    with pytest.raises(NonFiniteError, match=f"after the update.*The last good state is .*{where}"):
        made.train()
    assert not os.path.exists(tmp_path / "last-good")


def test_an_example_alone_may_be_finite(tmp_path):
    """Nothing is found again: it is said, and no row is accused."""
    from poison import Poison

    loss = Poison(2, "loss")
    made = loss.made = trainer("sft", tmp_path, loss=loss)
    once = type(loss).__call__

    class Once(Poison):
        def __call__(self, at, generator=None):
            return once(self, at, generator) if self.left == 2 or self.left == 1 else -at(1.0).token_logps

    loss.__class__ = Once
    with pytest.raises(NonFiniteError, match="Recomputed alone, every example of the step is finite"):
        made.train()


def test_fp16_stops_after_many_skipped_steps_and_not_before(tmp_path, monkeypatch):
    made = trainer("dpo", tmp_path, loss="dpo")
    made.step_batches = []
    callback = next(c for c in made.callback_handler.callbacks if isinstance(c, finite.FiniteSteps))
    monkeypatch.setattr(type(made.accelerator), "optimizer_step_was_skipped", True)
    args = SimpleNamespace(fp16=True, learning_rate=1.0)
    vector_of(made.model).grad = torch.full((32,), torch.inf)
    callback.on_pre_optimizer_step(args, made.state, None)  # the scaler's affair
    for _ in range(finite._SKIPPED - 1):
        callback.on_optimizer_step(args, made.state, None)
    with pytest.raises(NonFiniteError, match="In fp16 40 steps in a row were skipped"):
        callback.on_optimizer_step(args, made.state, None)


# -- spikes ---------------------------------------------------------------------------------------------------------


def warned(losses, caplog, **options) -> list[int]:
    """Steps at which the callback warns."""
    callback, found = LossSpikes(**options), []
    for step in range(1, len(losses) + 1):
        caplog.clear()
        history = [{"loss": loss} for loss in losses[:step]]
        state = SimpleNamespace(log_history=history, global_step=step, is_world_process_zero=True)
        with caplog.at_level(logging.WARNING):
            callback.on_log(None, state, TrainerControl(), logs=history[-1])
        found += [step] if "Loss spike" in caplog.text else []
    return found


def test_the_rule_by_hand(caplog):
    """Median 2.5, MAD 0.5: the limit is 2.5 + 10 * 1.4826 * 0.5 = 9.913."""
    calm = [2.0, 3.0] * 5
    assert warned([*calm, 9.90], caplog) == []
    assert warned([*calm, 9.92], caplog) == [11]
    assert warned([*calm[:9], 50.0], caplog) == [], "too few before it"
    assert warned([*calm, math.nan], caplog) == [], "the guard's affair"
    assert warned([2.0] * 10 + [2.39], caplog) == [] and warned([2.0] * 10 + [2.41], caplog) == [11], "the floor"
    assert warned([*calm, 9.92], caplog, factor=20.0) == []
    assert warned([9.0] * 20 + calm + [8.0], caplog, window=10) == [] and warned(
        [90.0] * 20 + calm + [12.0], caplog, window=10
    ) == [31]


class Jump(Loss):
    """Cross-entropy, in one call a hundred times as much."""

    needs = Needs(pairs=False, unit="token")

    def __init__(self, call: int) -> None:
        self.left = call

    def __call__(self, at, generator=None):
        self.left -= 1
        return -at(1.0).token_logps * (100 if self.left == 0 else 1)


@pytest.mark.parametrize("stop", [True, False])
def test_a_training_stops_at_a_spike_if_asked(stop, tmp_path, caplog):
    made = trainer("sft", tmp_path, loss=Jump(15), max_steps=18, learning_rate=1e-4)
    made.add_callback(LossSpikes(stop=stop))
    made.train()
    assert made.state.global_step == (15 if stop else 18)
    assert caplog.text.count("Loss spike at step") == caplog.text.count("Loss spike at step 15: ") == 1


class LoudRow(Loss):
    """Cross-entropy; from a call on, an example that holds a word weighs a hundred times as much."""

    needs = Needs(pairs=False, unit="token")

    def __init__(self, call: int) -> None:
        self.left, self.token = call, tokenizer().convert_tokens_to_ids(BAD_WORD)

    def __call__(self, at, generator=None):
        self.left -= 1
        out = at(1.0)
        loud = (at.batch.inputs["input_ids"] == self.token).any(dim=1, keepdim=True)
        weight = 1 + 99 * loud.float() if self.left <= 0 else 1
        return -out.token_logps * weight


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_training_stops_before_a_spike(accumulation, tmp_path):
    """Rows and parameter are named; what is kept is the state after the step before, bit for bit."""
    options = dict(
        data=one_bad_row("sft"), learning_rate=1e-2, lr_scheduler_type="constant",
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=8 // accumulation,
    )  # fmt: skip
    made = trainer("sft", tmp_path, loss=LoudRow(14 * accumulation + 1), max_steps=18, **options)
    made.add_callback(LossSpikes(stop="before"))
    with pytest.raises(LossSpikeError, match=r"Loss spike at step 15: .*median of the 14 logged before") as error:
        made.train()
    message = str(error.value)
    first = message.partition("Largest loss: ")[2].partition(";")[0]
    assert "of row 5 (" in first and BAD_WORD in first, message
    assert "The largest gradient is that of" in message and "layers.2.steer" in message
    assert "The state after step 14 is saved in" in message and "Lower the learning rate" in message
    assert made.state.global_step == 14
    straight = trained("sft", tmp_path / "straight", loss=LoudRow(1000), max_steps=14, **options)
    kept = PeftModel.from_pretrained(tiny(), tmp_path / "last-good", is_trainable=True)
    expected = values(straight.model)
    assert all(torch.equal(value, expected[name]) for name, value in values(kept).items())
    assert any(value.abs().max() > 0.01 for value in expected.values()), "it has moved"


def test_the_loss_before_the_step_is_the_one_that_is_logged(tmp_path):
    seen, spikes = [], LossSpikes()

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append(float(spikes.step_loss))

    made = trainer("dpo", tmp_path, loss="dpo", gradient_accumulation_steps=2, per_device_train_batch_size=2)
    made.add_callback(spikes)
    made.add_callback(Look())
    made.train()
    assert seen == pytest.approx([line["loss"] for line in made.state.log_history if "loss" in line], rel=1e-6)


def test_a_trainer_that_cannot_stop_before_the_step_says_so(tmp_path):
    made = trainer("sft", tmp_path, peft_config=None, loss=None)
    made.add_callback(LossSpikes(stop="before"))
    with pytest.raises(ValueError, match=r"stop='before'\) needs SteeringTrainer"):
        made.train()
    with pytest.raises(ValueError, match="stop='after' must be"):
        LossSpikes(stop="after")
