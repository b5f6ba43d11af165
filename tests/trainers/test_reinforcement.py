"""Reinforcement learning with vectors: TRL's trainers, whose numbers stay theirs."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny_data import history, same, tokenizer, values
from tiny_models import steered, tiny
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from steertune.adapters import SteeringVectorConfig
from steertune.recipes.lab.embedded import load_model, load_tokenizer
from steertune.recipes.lab.sources import load_split
from steertune.trainers import NonFiniteError, RewardError, SteeringGRPOTrainer, SteeringRLOOTrainer

KINDS = {
    "grpo": (SteeringGRPOTrainer, GRPOTrainer, GRPOConfig),
    "rloo": (SteeringRLOOTrainer, RLOOTrainer, RLOOConfig),
}
PROMPTS = Dataset.from_list([{"prompt": "dog cat "}, {"prompt": "cat dog "}] * 4)


def variety(completions, **kwargs) -> list[float]:
    """The share of words that are different."""
    return [len(set(text.split())) / max(len(text.split()), 1) for text in completions]


def make(kind: str, folder, stock: bool = False, model=None, rewards=variety, rows=PROMPTS, **options):
    own = {name: options.pop(name) for name in ("peft_config", "vector_learning_rate") if name in options}
    ours, theirs, config = KINDS[kind]
    given = dict(
        use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=3, per_device_train_batch_size=8,
        num_generations=4, max_completion_length=5, logging_steps=1, gradient_checkpointing=False, beta=0.0,
        save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    return (theirs if stock else ours)(
        model=tiny() if model is None else model,
        reward_funcs=rewards,
        args=config(str(folder), **{**given, **options}),
        train_dataset=rows,
        processing_class=tokenizer(),
        **own,
    )


def trained(made):
    made.train()
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_numbers_are_those_of_the_stock_trainer(kind, beta, tmp_path):
    options = dict(learning_rate=1e-3, beta=beta, peft_config=SteeringVectorConfig())
    # completions are drawn with the global random numbers, which the constructor seeds
    made, stock = (
        trained(make(kind, tmp_path / name, stock=name == "stock", **options)) for name in ("ours", "stock")
    )
    names = ("loss", "reward", "entropy")
    assert history(made, *names) == [pytest.approx(logs, abs=1e-6) for logs in history(stock, *names)]
    for name, value in values(made.model).items():
        torch.testing.assert_close(value, values(stock.model)[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_is_one_vector_at_a_rate_that_moves_it(kind, tmp_path):
    made = make(kind, tmp_path)
    made.train()
    [(name, vector)] = values(made.model).items()
    assert "steering_vector_v" in name and vector.dtype == torch.float32 and vector.any()
    assert made.optimizer.param_groups[0]["initial_lr"] == 1e-3
    assert history(made, "vector/norm")[-1]["vector/norm"] == pytest.approx(float(vector.norm()), rel=1e-4)
    made.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny(), str(tmp_path / "saved"), is_trainable=True)
    assert same(values(loaded), values(made.model)) and (tmp_path / "saved" / "README.md").is_file()


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_saved_vector_goes_on(beta, tmp_path):
    made = make("grpo", tmp_path, model=steered(tiny()), beta=beta, vector_learning_rate=1e-3)
    before = values(made.model)
    made.train()
    after = {name: value for name, value in values(made.model).items() if "default" in name}
    assert after and not same({name: before[name] for name in after}, after)


@pytest.mark.slow
@pytest.mark.real
def test_a_vector_learns_an_opening_word(tmp_path):
    """The reward is 1 for answers that begin with "The", as one in fourteen does without training."""

    def opens(completions, **kwargs):
        return [float(answer[0]["content"].startswith("The")) for answer in completions]

    rows = load_split("cautious_advice", "train").select(range(16)).select_columns("prompt")
    args = GRPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=16, logging_steps=1,
        per_device_train_batch_size=32, num_generations=8, max_completion_length=4, beta=0.0, loss_type="dr_grpo",
        scale_rewards="none", lr_scheduler_type="constant", gradient_checkpointing=False, save_strategy="no",
    )  # fmt: skip
    made = SteeringGRPOTrainer(
        model=load_model(), reward_funcs=opens, args=args, train_dataset=rows, processing_class=load_tokenizer()
    )
    made.train()
    rewards = [logs["reward"] for logs in history(made, "reward")]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.2, rewards


# -- nothing silent ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_adapter_is_refused_and_stock_trainers_warn(kind, tmp_path):
    steered(tiny()).save_pretrained(tmp_path / "saved")
    frozen = PeftModel.from_pretrained(tiny(), str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="is_trainable=True"):
        make(kind, tmp_path, model=frozen)
    frozen = PeftModel.from_pretrained(tiny(), str(tmp_path / "saved"))
    with pytest.warns(UserWarning, match="training it would change nothing"):
        frozen.train()


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_that_is_no_number_is_refused(kind, tmp_path):
    def broken(completions, **kwargs):
        return [1.0, float("nan")] * (len(completions) // 2)

    with pytest.raises(RewardError, match="'broken' returned nan for completion 1"):
        make(kind, tmp_path, rewards=broken).train()

    def short(completions, **kwargs):
        return [1.0]

    with pytest.raises(ValueError, match="short"):
        make(kind, tmp_path, rewards=[variety, short]).train()

    async def later(completions, **kwargs):
        return [float("inf")] * len(completions)

    with pytest.raises(RewardError, match="'later' returned inf"):
        make(kind, tmp_path, rewards=[later]).train()


def test_a_reward_may_leave_a_completion_out(tmp_path):
    def first(completions, **kwargs):
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    make("grpo", tmp_path, rewards=[variety, first]).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(peft_config=SteeringVectorConfig(positions="completion")), "Use positions='all'"),
        (dict(peft_config=SteeringVectorConfig(init="mean_difference")), "Use init='zeros'"),
        (dict(use_vllm=True), "Set use_vllm=False"),
        (dict(vector_learning_rate=0.0), "must be a finite number above 0"),
        (dict(learning_rate=-1.0), "learning_rate"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_work_is_refused_at_construction(kind, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(kind, tmp_path, **options)


def test_groups_without_a_difference_are_said(tmp_path, caplog):
    def same_for_all(completions, **kwargs):
        return [1.0] * len(completions)

    with caplog.at_level(logging.WARNING):
        make("grpo", tmp_path, rewards=same_for_all, max_steps=6).train()
    assert caplog.text.count("all completions of a prompt got the same reward") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make("grpo", tmp_path, max_steps=6).train()
    assert "same reward" not in caplog.text


def test_a_loss_that_is_nan_ends_the_training(tmp_path, monkeypatch):
    made = make("grpo", tmp_path)
    monkeypatch.setattr(GRPOTrainer, "training_step", lambda *args, **kwargs: torch.tensor(float("nan")))
    with pytest.raises(NonFiniteError, match="Lower the learning rate"):
        made.train()
