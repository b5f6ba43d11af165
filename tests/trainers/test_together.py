"""Arms that train side by side come out as they would alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny_data import demonstrations, history, pairs, trainer, values
from tiny_models import tiny
from transformers import set_seed

from steertune.adapters import SteeringVectorConfig
from steertune.losses.cross_entropy import CrossEntropy
from steertune.trainers import FrozenPrefix, NonFiniteError, share_weights, train_together
from steertune.trainers.prefix.decoder import Decoder


def arms(kind: str, folder, count: int = 2, base=None, changes=(), **options) -> list:
    """Trainers that differ in learning rate and seed, on one set of weights."""
    base, prefix = base or tiny(), options.pop("frozen_prefix", None) or FrozenPrefix()
    found = []
    for i in range(count):
        # Adam divides by the size of the gradient: without the epsilon, rounding decides where it is almost nothing
        own = {
            "learning_rate": 0.01 * (i + 1),
            "seed": i,
            "adam_epsilon": 1e-4,
            **options,
            **(changes[i] if i < len(changes) else {}),
        }
        set_seed(own["seed"])
        found.append(trainer(kind, folder / str(i), share_weights(base), frozen_prefix=prefix, **own))
    return found


def alone(trainers: list) -> list:
    for made in trainers:
        set_seed(made.args.seed)
        made.train()
    return trainers


def assert_same(ours: list, separate: list) -> None:
    for one, other in zip(ours, separate, strict=True):
        assert one.state.global_step == other.state.global_step
        first, second = values(one.model), values(other.model)
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=2e-4)
        for entry, expected in zip(history(one), history(other), strict=True):
            assert entry == pytest.approx(expected, abs=1e-4, rel=1e-4)


def test_the_parameters_of_a_shared_copy_are_new_objects_on_the_same_storage():
    model = tiny()
    copied = share_weights(model)
    for one, other in zip(model.parameters(), copied.parameters(), strict=True):
        assert one is not other
        assert one.data_ptr() == other.data_ptr()
    copied.requires_grad_(False)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("form", ["bias", "gated", "linear", "low_rank"])
@pytest.mark.parametrize("kind,loss", [("sft", "cross_entropy"), ("dpo", "dpo"), ("dpo", "bipo")])
def test_equals_separate_training(kind, loss, form, tmp_path):
    rank = {"rank": 2} if form == "low_rank" else {}
    config = SteeringVectorConfig(layers=1, form=form, **rank)
    options = {"loss": loss, "peft_config": config, "max_steps": 4, "per_device_train_batch_size": 2}
    assert_same_after_both(kind, tmp_path, **options)


def assert_same_after_both(kind, tmp_path, **options):
    ours = arms(kind, tmp_path / "ours", **options)
    before = [values(made.model) for made in ours]
    train_together(ours)
    assert_same(ours, alone(arms(kind, tmp_path / "alone", **options)))
    for made, start in zip(ours, before, strict=True):
        assert any(not torch.equal(value, start[name]) for name, value in values(made.model).items())


@pytest.mark.parametrize("positions", ["completion", "prompt", "last_prompt"])
@pytest.mark.parametrize("kind,loss", [("sft", "cross_entropy"), ("dpo", "dpo")])
def test_equals_separate_training_at_some_positions(kind, loss, positions, tmp_path):
    config = SteeringVectorConfig(layers=1, positions=positions)
    assert_same_after_both(kind, tmp_path, loss=loss, peft_config=config)


@pytest.mark.parametrize("without_memo", [False, True])
def test_equals_separate_training_with_other_data_norms_inits_and_lengths(without_memo, tmp_path):
    changes = [
        {"data": pairs(8, seed=3), "gradient_accumulation_steps": 2},
        {"data": pairs(6, seed=4), "max_steps": 7, "gradient_accumulation_steps": 2},
        {"data": pairs(8, seed=5), "loss": "ipo", "max_grad_norm": 0.01, "gradient_accumulation_steps": 2},
    ]
    for change, switches in zip(
        changes, [{"norm": "capped", "norm_value": 0.1}, {"init": "mean_difference"}, {"init": "random"}], strict=True
    ):
        change["peft_config"] = SteeringVectorConfig(layers=[1, 2], **switches)
    options = {"loss": "dpo", "per_device_train_batch_size": 2, "changes": changes, "count": 3}
    if without_memo:
        options["frozen_prefix"] = FrozenPrefix(ram_gb=0)
    assert_same_after_both("dpo", tmp_path, **options)


@pytest.mark.parametrize("count", [2, 4])
def test_arms_whose_rows_begin_alike_are_not_mixed(count, tmp_path):
    """The same rows in every arm, of which a pair batch would share the prompts."""
    options = {"count": count, "loss": "cross_entropy", "seed": 0, "max_steps": 4, "lr_scheduler_type": "constant"}
    options["data"] = demonstrations(4)
    config = SteeringVectorConfig(layers=1, init="random")
    assert_same_after_both("sft", tmp_path, peft_config=config, **options)


def test_tied_vectors(tmp_path):
    config = SteeringVectorConfig(layers=[1, 3], tied=True)
    assert_same_after_both("dpo", tmp_path, loss="dpo", peft_config=config)


@pytest.mark.thinned(3)
def test_on_every_architecture(architecture, tmp_path):
    options = {"loss": "dpo", "count": 2, "max_steps": 2, "peft_config": SteeringVectorConfig(layers=1)}
    ours = arms("dpo", tmp_path / "ours", base=tiny(architecture), **options)
    train_together(ours)
    assert_same(ours, alone(arms("dpo", tmp_path / "alone", base=tiny(architecture), **options)))


def test_all_arms_run_in_one_pass(tmp_path, monkeypatch):
    seen = []
    run = Decoder.run

    def spy(self, call, state):
        if torch.is_grad_enabled():
            seen.append((len(call["input_ids"]), state is not None))
        return run(self, call, state)

    monkeypatch.setattr(Decoder, "run", spy)
    options = {"loss": "cross_entropy", "max_steps": 2, "peft_config": SteeringVectorConfig(layers=1)}
    train_together(arms("sft", tmp_path, **options))
    assert seen == [(8, True), (8, True)], "two steps of two arms with four rows each, from the cut"


def test_evaluation_is_each_arm_s_own(tmp_path):
    options = {"loss": "dpo", "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": pairs(3, seed=9)}
    ours = arms("dpo", tmp_path / "ours", **options)
    train_together(ours)
    separate = alone(arms("dpo", tmp_path / "alone", **options))
    assert_same(ours, separate)
    assert history(ours[0], "eval_loss") != history(ours[1], "eval_loss")


class Breaks(CrossEntropy):
    """Not a number from the second step on."""

    calls = 0

    def __call__(self, at, generator=None):
        type(self).calls += 1
        return super().__call__(at, generator) * (float("nan") if self.calls > 1 else 1.0)


def test_an_arm_that_diverges_leaves_the_others_alone(tmp_path):
    Breaks.calls = 0
    changes = [{}, {"loss": Breaks()}]
    results = train_together(ours := arms("sft", tmp_path / "ours", 3, loss="cross_entropy", changes=changes))
    assert isinstance(results[1], NonFiniteError)
    assert "step 2" in str(results[1])
    separate = alone(arms("sft", tmp_path / "alone", 3, loss="cross_entropy")[::2])
    assert_same(ours[::2], separate)


class Fails(CrossEntropy):
    """A mistake in somebody's loss."""

    def __call__(self, at, generator=None):
        raise KeyError("a mistake")


def test_any_other_error_ends_all(tmp_path):
    with pytest.raises(KeyError, match="a mistake"):
        train_together(arms("sft", tmp_path, loss="cross_entropy", changes=[{}, {"loss": Fails()}]))


def _other_base(made):
    made[1] = arms("sft", Path(made[0].args.output_dir), 1, base=tiny(seed=1), loss="cross_entropy")[0]


def _same_model(made):
    made[1].model = made[0].model


REFUSED = {
    "no loss of ours": ({"changes": [{}, {"loss": None}]}, "no loss of steertune"),
    "a LoRA": ({"changes": [{}, {"peft_config": LoraConfig(target_modules="all-linear")}]}, "no steering vector"),
    "other layers": ({"changes": [{}, {"peft_config": SteeringVectorConfig(layers=3)}]}, "it steers .*layers.3"),
    "another form": ({"changes": [{}, {"peft_config": SteeringVectorConfig(form="gated")}]}, "another form"),
    "checkpointing": ({"gradient_checkpointing": True}, "gradient checkpointing"),
    "another base": (_other_base, "another base model: .*differs"),
    "the same model": (_same_model, "share_weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_train_together_is_refused_before_anything_runs(case, tmp_path):
    change, message = REFUSED[case]
    made = arms("sft", tmp_path, 2, **{"loss": "cross_entropy", **(change if isinstance(change, dict) else {})})
    if callable(change):
        change(made)
    with pytest.raises(ValueError, match=message):
        train_together(made)
    assert all(one.state.global_step == 0 for one in made)


def test_a_pair_loss_and_another(tmp_path):
    made = arms("dpo", tmp_path, 2, loss="dpo", changes=[{}, {"loss": "cross_entropy"}])
    with pytest.raises(ValueError, match="compares pairs"):
        train_together(made)


def test_the_models_are_as_usual_afterwards(tmp_path):
    ours = arms("sft", tmp_path / "ours", 2, loss="cross_entropy", data=demonstrations(4))
    train_together(ours)
    ours[0].save_model(tmp_path / "saved")
    again = copy.deepcopy(ours[0].model)
    assert values(again).keys() == values(ours[0].model).keys()
    assert [*ours[0].model.peft_config] == ["default"]
    set_seed(0)
    ours[0].train()
