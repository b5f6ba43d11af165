"""The trainers are their parents, number for number, where they promise to be."""

from __future__ import annotations

import pytest
import tiny_data
import torch
from datasets import Dataset
from peft import BeftConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from tiny_data import (
    arguments,
    conversational,
    demonstrations,
    history,
    losses,
    pairs,
    same,
    tokenizer,
    trained,
    trainer,
    values,
)
from tiny_models import tiny
from upstream import PARENTS, tokenised, upstream

from steertune.adapters import SteeringVectorConfig
from steertune.losses import get_loss
from steertune.trainers import SteeringTrainer
from steertune.trainers.batch import Batch

LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])


def assert_equal_to_dpo(folder, tolerance: float, peft_config, changes=None, data=None, **options) -> None:
    """`loss="dpo"` logs the losses and gradient norms of TRL's own loss, and ends at the same parameters."""
    changes = changes or {}
    ours = trained("dpo", folder, data=data, loss="dpo", peft_config=peft_config, **changes, **options)
    theirs = upstream("dpo", folder, data=data, peft_config=peft_config, changes=changes, **options)
    for mine, other in zip(history(ours, "loss", "grad_norm"), history(theirs, "loss", "grad_norm"), strict=True):
        assert mine == pytest.approx(other, abs=tolerance, rel=tolerance)
    assert len(set(losses(ours))) == len(losses(ours)) == 3, "the loss has to move"
    for name, value in values(ours.model).items():
        torch.testing.assert_close(value, dict(theirs.model.named_parameters())[name], atol=1e-5, rtol=1e-5)


# -- the parent's own loss (without an adapter: test_trainers_parents.py) ---------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_with_an_adapter_and_the_parents_loss_the_parents_numbers_are_unchanged(kind, tmp_path):
    ours = trained(kind, tmp_path, peft_config=SteeringVectorConfig(), loss=None, frozen_prefix=False)
    theirs = upstream(kind, tmp_path, peft_config=SteeringVectorConfig())
    for mine, other in zip(history(ours), history(theirs), strict=True):
        assert {name: mine[name] for name in other} == pytest.approx(other, rel=1e-6, abs=1e-6)
    for name, value in values(ours.model).items():
        torch.testing.assert_close(value, values(theirs.model)[name], atol=1e-6, rtol=1e-6)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", "robust", "apo_zero", ["sigmoid", "sft"]])
@pytest.mark.parametrize("frozen_prefix", [None, False])
def test_every_loss_of_dpo_is_trls_with_the_default_prefix(loss_type, frozen_prefix, tmp_path):
    changes = dict(loss_type=loss_type, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    theirs = upstream("dpo", tmp_path, peft_config=SteeringVectorConfig(), changes=changes)
    ours = trained("dpo", tmp_path, peft_config=SteeringVectorConfig(), frozen_prefix=frozen_prefix, **changes)
    for mine, other in zip(history(ours), history(theirs), strict=True):
        assert {name: mine[name] for name in other} == pytest.approx(other, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind, changes, ours", [
    ("dpo", {}, "dpo"),
    ("dpo", dict(loss_type="ipo", beta=0.3), "ipo"),
    ("dpo", dict(loss_type="hinge"), None),
    ("dpo", dict(use_weighting=True), None),
    ("dpo", dict(ld_alpha=0.5), None),
    ("dpo", dict(disable_dropout=False), None),
    ("sft", {}, "cross_entropy"),
    ("sft", dict(loss_type="dft"), None),
    ("sft", dict(label_smoothing_factor=0.1), None),
])  # fmt: skip
def test_a_parents_loss_that_is_one_of_ours_takes_our_path(kind, changes, ours, tmp_path):
    made = trainer(kind, tmp_path, **changes)
    options = {"beta": made.args.beta} if kind == "dpo" else {}
    assert made.loss is None and made.loss_at_work == (None if ours is None else get_loss(ours, **options))


def test_the_plain_trainer_takes_it_for_causal_models_without_a_loss_of_their_own(tmp_path):
    assert trainer("plain", tmp_path, data=demonstrations()).loss_at_work == get_loss("cross_entropy")
    mixture = trainer("plain", tmp_path, data=demonstrations(), model=tiny("mixtral"))
    assert mixture.loss_at_work is None, "the auxiliary loss of its routers is the parent's"


@pytest.mark.parametrize(
    ("loss", "stance"),
    [
        ("dpo", "force_eager"),
        *(pytest.param(loss, "default", marks=pytest.mark.slow) for loss in ("dpo", None, "bipo")),
    ],
)
def test_a_compiled_model_has_its_reference(loss, stance, tmp_path):
    """A backend that generates no code: what is compiled is the same. With `force_eager`, which is quick, there is the
    wrapper alone."""
    compiled = dict(torch_compile=True, torch_compile_backend="aot_eager")
    options = dict(loss=loss, peft_config=SteeringVectorConfig(positions="completion"), max_steps=4)
    with torch.compiler.set_stance(stance):
        ours = losses(trained("dpo", tmp_path, **options, **compiled))
    assert ours == pytest.approx(losses(trained("dpo", tmp_path, **options)), abs=1e-5)


def unequal_pairs() -> Dataset:
    """Rows of 20 to 50 tokens: alone, they round in another way than in a batch."""
    say = tiny_data._speaker(0)
    return Dataset.from_list(
        [dict(prompt=say(10 + 3 * i) + " ", chosen=say(4 + 2 * i), rejected=say(6 + i)) for i in range(8)]
    )


@pytest.mark.thinned(3)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peft_config", [SteeringVectorConfig(), LORA], ids=["vector", "lora"])
@pytest.mark.parametrize("loss", [None, "dpo", "ipo"])
def test_an_untrained_adapter_has_no_margin_in_bf16(loss, peft_config, weights, tmp_path):
    changes, data = dict(bf16=True, gradient_checkpointing=True), unequal_pairs()
    made = trained("dpo", tmp_path, tiny().to(weights), data, loss=loss, peft_config=peft_config, **changes)
    theirs = upstream("dpo", tmp_path, data, model=tiny().to(weights), peft_config=peft_config, changes=changes)
    first = made.state.log_history[0]
    assert first["rewards/margins" if loss is None else "margin_gain"] == 0.0
    if loss != "ipo":
        assert first["loss"] == pytest.approx(theirs.state.log_history[0]["loss"], abs=1e-3)
        assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_positional_arguments_of_the_parents_still_work(tmp_path):
    data, args = pairs(), arguments("dpo", tmp_path)
    from steertune.trainers import SteeringDPOTrainer, SteeringSFTTrainer

    made = SteeringDPOTrainer(tiny(), None, args, None, data, None, tokenizer())
    assert made.train_dataset.column_names[:3] == ["prompt", "chosen", "rejected"] and made.ref_model is None
    assert isinstance(made.model, PeftModel)
    args = arguments("sft", tmp_path)
    made = SteeringSFTTrainer(tiny(), args, None, demonstrations(), None, tokenizer(), loss="cross_entropy")
    assert isinstance(made.model, PeftModel) and made.args.output_dir == args.output_dir
    given = tokenised()
    made = SteeringTrainer(tiny(), arguments("plain", tmp_path), given["data_collator"], given["data"])
    made.train()
    assert isinstance(made.model, PeftModel) and len(losses(made)) == 3


# -- our losses against the parent's --------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("peft_config", [SteeringVectorConfig(), LORA], ids=["vector", "lora"])
def test_cross_entropy_is_sfts_own_loss(peft_config, accumulation, tmp_path):
    changes = dict(per_device_train_batch_size=2, gradient_accumulation_steps=accumulation)
    ours = trained("sft", tmp_path, loss="cross_entropy", peft_config=peft_config, **changes)
    theirs = upstream("sft", tmp_path, peft_config=peft_config, changes=changes)
    for mine, other in zip(history(ours, "loss", "grad_norm"), history(theirs, "loss", "grad_norm"), strict=True):
        assert mine == pytest.approx(other, rel=2e-6)
    for name, value in values(ours.model).items():
        torch.testing.assert_close(value, dict(theirs.model.named_parameters())[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("peft_config", [SteeringVectorConfig(), LORA], ids=["vector", "lora"])
def test_dpo_is_trls_own_loss_step_by_step(peft_config, accumulation, tmp_path):
    changes = dict(per_device_train_batch_size=2, gradient_accumulation_steps=accumulation)
    assert_equal_to_dpo(tmp_path, 2e-6, peft_config, changes)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "gpt_neox"])
def test_dpo_is_trls_own_loss_on_other_architectures(architecture, tmp_path):
    ours = trained("dpo", tmp_path, model=tiny(architecture), loss="dpo")
    theirs = upstream("dpo", tmp_path, model=tiny(architecture), peft_config=SteeringVectorConfig())
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-6)


def test_dpo_is_trls_own_loss_in_full_finetuning(tmp_path):
    changes = dict(learning_rate=0.001)
    ours = trained("dpo", tmp_path, loss="dpo", peft_config=None, ref_model=tiny(), **changes)
    theirs = upstream("dpo", tmp_path, ref_model=tiny(), changes=changes)
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-6)


def test_dpo_is_trls_own_loss_with_reference_log_probabilities_computed_before(tmp_path):
    assert_equal_to_dpo(tmp_path, 2e-6, SteeringVectorConfig(), dict(precompute_ref_log_probs=True))


def test_labels_off_by_one_would_be_noticed(tmp_path, monkeypatch):
    read = Batch.read

    def off_by_one(inputs):
        batch = read(inputs)
        return Batch(batch.inputs, batch.labels.roll(1, dims=1), batch.pairs)

    assert_equal_to_dpo(tmp_path, 2e-6, SteeringVectorConfig())
    monkeypatch.setattr(Batch, "read", off_by_one)
    with pytest.raises(AssertionError):
        assert_equal_to_dpo(tmp_path, 2e-6, SteeringVectorConfig())


# -- the three trainers among each other ----------------------------------------------------------------------------


@pytest.mark.thinned(2)
@pytest.mark.parametrize("form", [lambda data: data, conversational], ids=["standard", "conversational"])
@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "bipo", "unlikelihood", "cross_entropy"])
def test_plain_trainer_gives_the_numbers_of_the_dpo_trainer(loss, form, tmp_path):
    plain, dpo = (trained(kind, tmp_path, data=form(pairs()), loss=loss) for kind in ("plain", "dpo"))
    assert losses(plain) == losses(dpo)
    assert same(values(plain.model), values(dpo.model))


@pytest.mark.parametrize("loss", [None, "cross_entropy"])
def test_plain_trainer_gives_the_numbers_of_the_sft_trainer(loss, tmp_path):
    plain, sft = (trained(kind, tmp_path, data=demonstrations(), loss=loss) for kind in ("plain", "sft"))
    assert losses(plain) == pytest.approx(losses(sft), rel=1e-6)
    for name, value in values(plain.model).items():
        torch.testing.assert_close(value, values(sft.model)[name], atol=1e-6, rtol=1e-6)


def test_cross_entropy_on_pairs_is_cross_entropy_on_their_chosen_answers(tmp_path):
    on_pairs = trained("dpo", tmp_path, loss="cross_entropy")
    chosen = pairs().rename_column("chosen", "completion").remove_columns("rejected")
    on_chosen = trained("sft", tmp_path, data=chosen, loss="cross_entropy")
    assert losses(on_pairs) == pytest.approx(losses(on_chosen), rel=1e-6)


# -- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARENTS)
def test_adapter_left_out_is_the_default_vector(kind, tmp_path):
    made = trainer(kind, tmp_path, loss="cross_entropy")
    [config] = made.model.peft_config.values()
    assert isinstance(config, SteeringVectorConfig) and config.layers == [2] and config.init == "zeros"


@pytest.mark.parametrize("kind", PARENTS)
def test_a_model_with_an_adapter_gets_no_second_one(kind, tmp_path):
    model = get_peft_model(tiny(), LORA)
    made = trainer(kind, tmp_path, model=model, loss="cross_entropy")
    assert made.model is model and model.peft_type == "LORA"
    assert not any("steering" in name for name, _ in model.named_parameters())


def test_the_callers_config_is_left_alone(tmp_path):
    config = SteeringVectorConfig()
    trainer("plain", tmp_path, loss="dpo", peft_config=config)
    assert config.layers == 2 / 3 and config.target_modules is None


OTHERS = {
    "lora": LORA,
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "beft": BeftConfig(target_modules=["down_proj"]),
}


@pytest.mark.parametrize("loss", ["dpo", "cross_entropy", "unlikelihood"])
@pytest.mark.parametrize("name", OTHERS)
def test_losses_train_any_peft_adapter(name, loss, tmp_path):
    made = trainer("plain", tmp_path, loss=loss, peft_config=OTHERS[name], eval_dataset=pairs())
    before = made.evaluate()["eval_loss"]
    made.train()
    assert made.evaluate()["eval_loss"] < before
    assert made.model.peft_type == name.upper()


@pytest.mark.parametrize("loss", ["dpo", "cross_entropy"])
def test_pefts_bias_on_the_last_linear_of_a_block_is_our_vector(loss, tmp_path):
    beft = BeftConfig(target_modules=["layers.2.mlp.down_proj"])
    theirs = trained("plain", tmp_path, loss=loss, peft_config=beft, max_steps=4)
    ours = SteeringVectorConfig(layers=2, stream_sizes={})  # a bias has absolute learning rates
    ours = trained("plain", tmp_path, loss=loss, peft_config=ours, max_steps=4)
    [bias], [vector] = values(theirs.model).values(), values(ours.model).values()
    assert vector.norm() > 0.1
    torch.testing.assert_close(bias.flatten(), vector, atol=1e-5, rtol=0)
    assert losses(theirs) == pytest.approx(losses(ours), abs=1e-5)
