"""Every training argument is used, or refused by name: none is dropped in silence."""

from __future__ import annotations

import dataclasses
import math

import pytest
from tiny_data import arguments, demonstrations, pairs, tokenizer, trainer
from tiny_models import tiny
from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig

from steertune.losses import get_loss
from steertune.trainers import SteeringTrainer
from steertune.trainers.arguments import FIELDS, changed, unused_by, use_of

CONFIGS = {"TrainingArguments": TrainingArguments, "SFTConfig": SFTConfig, "DPOConfig": DPOConfig}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_of_the_installed_version_is_classified(name):
    """A field that upstream adds fails here by name: say in `trainers/arguments.py` what it does with our losses."""
    known = {*FIELDS[name], *FIELDS["TrainingArguments"]}
    fields = {field.name for field in dataclasses.fields(CONFIGS[name])}
    assert fields - known == set()


def test_no_field_is_classified_twice_in_one_configuration():
    for name in ("SFTConfig", "DPOConfig"):
        assert FIELDS[name].keys() & FIELDS["TrainingArguments"].keys() == set()


# value of every field that belongs to the parent's own loss -> trainer, loss, what the error names
REFUSED = {
    "label_smoothing_factor": [("plain", 0.1), ("sft", 0.1), ("dpo", 0.1)],
    "router_aux_loss_coef": [("sft", 0.01), ("dpo", 0.01)],
    "loss_type": [("sft", "dft"), ("dpo", "hinge"), ("dpo", ["sigmoid", "sft"])],
    "loss_weights": [("dpo", [0.5])],
    "ld_alpha": [("dpo", 0.5), ("dpo", 0.0)],
    "f_divergence_type": [("dpo", "js_divergence")],
    "f_alpha_divergence_coef": [("dpo", 0.3)],
    "label_smoothing": [("dpo", 0.1)],
    "use_weighting": [("dpo", True)],
    "discopop_tau": [("dpo", 0.1)],
    "sync_ref_model": [("dpo", True)],
    "ref_model_mixup_alpha": [("dpo", 0.5)],
    "ref_model_sync_steps": [("dpo", 8)],
    "beta": [("dpo", 0.3)],
}


@pytest.mark.parametrize(("name", "kind", "value"), [(n, *case) for n, cases in REFUSED.items() for case in cases])
def test_what_only_the_parents_loss_reads_is_refused_with_ours(name, kind, value, tmp_path):
    loss = "dpo" if kind == "dpo" else "cross_entropy"
    with pytest.raises(ValueError, match=rf"{name}=.* belongs to (TRL's|the parent's) own loss"):
        trainer(kind, tmp_path, loss=loss, **{name: value})


def test_all_of_them_are_tried_above():
    fields = {name: use for table in FIELDS.values() for name, use in table.items()}
    # one process averages over all devices, whatever this says
    assert {n for n, use in fields.items() if use in ("refused", "matched")} - {*REFUSED} == {
        "average_tokens_across_devices"
    }


def test_averages_of_every_process_are_refused_where_there_are_several(tmp_path):
    args = arguments("plain", tmp_path, average_tokens_across_devices=False)
    assert unused_by(get_loss("dpo"), args) == []

    class Two(type(args)):
        world_size = 2

    args.__class__ = Two
    assert unused_by(get_loss("dpo"), args) == ["average_tokens_across_devices"]


def test_with_the_parents_loss_they_are_the_parents(tmp_path):
    trainer("dpo", tmp_path, loss=None, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2], label_smoothing=0.1)
    trainer("sft", tmp_path, loss=None, loss_type="dft")
    trainer("plain", tmp_path, loss=None, data=demonstrations(), label_smoothing_factor=0.1)


def test_values_that_change_nothing_are_welcome(tmp_path):
    trainer("dpo", tmp_path, loss="dpo", loss_weights=[1.0], ld_alpha=1.0, label_smoothing=0, router_aux_loss_coef=0.0)
    trainer("dpo", tmp_path, loss=get_loss("ipo", beta=0.3), loss_type="ipo", beta=0.3)


def test_what_is_unused_is_listed(tmp_path):
    args = arguments("dpo", tmp_path, loss_type="ipo", beta=0.2, label_smoothing=0.1, ld_alpha=0.5)
    assert unused_by(get_loss("ipo", beta=0.2), args) == ["ld_alpha", "label_smoothing"]
    assert unused_by(get_loss("dpo", beta=0.2), args) == ["loss_type", "ld_alpha", "label_smoothing"]
    assert unused_by(get_loss("dpo"), None) == []
    assert "learning_rate" in changed(args) and use_of(args, "learning_rate") == "used"


def test_a_reference_for_a_loss_without_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True.*choose a loss with a reference"):
        trainer("dpo", tmp_path, loss="simpo", precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="ref_model is given, but SimPO.* does not use a reference"):
        trainer("dpo", tmp_path, loss="simpo", peft_config=None, ref_model=tiny())


def test_a_loss_function_beside_our_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func=.* would not be called"):
        SteeringTrainer(
            tiny(), arguments("plain", tmp_path), train_dataset=pairs(), processing_class=tokenizer(), loss="dpo",
            compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean(),
        )  # fmt: skip


NONSENSE = [
    ("dpo", "beta", 0.0), ("dpo", "beta", -0.1), ("dpo", "beta", math.nan), ("dpo", "beta", math.inf),
    ("dpo", "beta", None), ("dpo", "label_smoothing", -0.1), ("dpo", "label_smoothing", 0.5),
    ("dpo", "label_smoothing", math.nan), ("dpo", "loss_weights", [-1.0]), ("dpo", "loss_weights", [math.nan]),
    ("dpo", "loss_weights", [0.0]), ("dpo", "ld_alpha", -0.1), ("dpo", "ld_alpha", 1.5), ("dpo", "discopop_tau", 0.0),
    ("dpo", "f_alpha_divergence_coef", math.nan), ("dpo", "ref_model_mixup_alpha", 2.0),
    ("dpo", "ref_model_sync_steps", 0), ("dpo", "max_length", -1), ("sft", "max_length", 0),
    ("sft", "router_aux_loss_coef", -0.1), ("sft", "label_smoothing_factor", -0.1),
    ("plain", "label_smoothing_factor", 1.0), ("plain", "neftune_noise_alpha", math.nan),
    ("plain", "max_grad_norm", math.nan),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "value"), NONSENSE)
@pytest.mark.parametrize("ours", [True, False], ids=["our loss", "the parent's"])
def test_values_without_sense_are_refused_whatever_the_loss(kind, name, value, ours, tmp_path):
    loss = None if not ours else "dpo" if kind == "dpo" else "cross_entropy"
    for options in ({}, {"peft_config": None}):
        data = demonstrations() if kind == "plain" and not ours else None
        with pytest.raises(ValueError, match=f"{name}=.* makes no sense. It must be"):
            trainer(kind, tmp_path, loss=loss, data=data, **{name: value}, **options)


def test_trls_configurations_change_nothing_in_the_plain_trainer(tmp_path):
    def made(args, data, loss):
        return SteeringTrainer(tiny(), args, train_dataset=data, processing_class=tokenizer(), loss=loss)

    made(arguments("sft", tmp_path), demonstrations(), "cross_entropy")
    made(arguments("dpo", tmp_path, beta=0.3), pairs(), get_loss("dpo", beta=0.3))
    with pytest.raises(ValueError, match="packing=True has no effect in SteeringTrainer.*SteeringSFTTrainer"):
        made(arguments("sft", tmp_path, packing=True), demonstrations(), "cross_entropy")
    with pytest.raises(ValueError, match="max_length=8 has no effect.*SteeringSFTTrainer or SteeringDPOTrainer"):
        made(arguments("dpo", tmp_path, max_length=8), pairs(), "dpo")
