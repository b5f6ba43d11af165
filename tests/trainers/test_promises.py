"""What the trainers promise beside the numbers of their parents."""

from __future__ import annotations

import math
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_data import (
    Spy,
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
from tiny_models import quantised_tiny, steered, tiny, vector_of
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from steertune.adapters import SteeringVectorConfig, directions
from steertune.trainers.batch import Batch

KINDS = ["plain", "sft", "dpo"]
TRAININGS = [("plain", "dpo"), ("sft", None), ("sft", "cross_entropy"), ("dpo", None), ("dpo", "dpo")]
GRADIENT_DESCENT = dict(optim="sgd", learning_rate=0.25, max_grad_norm=0.0, lr_scheduler_type="constant")


def data_for(kind: str, rows: int = 8):
    return demonstrations(rows) if kind == "sft" else pairs(rows)


def loss_for(kind: str) -> str:
    return "cross_entropy" if kind == "sft" else "dpo"


# -- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("kind", "loss"), [("dpo", None), ("dpo", "dpo"), ("plain", "dpo")])
@pytest.mark.parametrize("start", ["fresh", "continued", "continued lora"])
def test_dpo_starts_at_ln_2(kind, loss, start, tmp_path):
    model = {"fresh": tiny, "continued": steered, "continued lora": random_lora}[start]()
    made = trained(kind, tmp_path, model=model, loss=loss)
    assert losses(made)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses(made)[1] - math.log(2)) > 1e-5


def random_lora() -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(tiny(), LoraConfig(r=2, init_lora_weights=False))


@pytest.mark.parametrize("kind", ["plain", "dpo"])
def test_reference_copy_of_a_continued_adapter_stays_and_the_adapter_moves(kind, tmp_path):
    model = steered()
    before = vector_of(model).clone()
    trained(kind, tmp_path, model=model, loss="dpo")
    assert torch.equal(vector_of(model, "ref"), before)
    assert not torch.allclose(vector_of(model), before, atol=1e-3)
    assert not vector_of(model, "ref").requires_grad and model.active_adapter == "default"


# -- resume ---------------------------------------------------------------------------------------------------------


def with_dropout() -> nn.Module:
    model = tiny("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return model


RESUMES = {
    "dpo": dict(kind="dpo", loss="dpo"),
    "dpo, TRL's loss": dict(kind="dpo", loss=None),
    "dpo, continued": dict(kind="dpo", loss="dpo", model=steered),
    "dpo, plain, dropout": dict(kind="plain", loss="dpo", model=with_dropout),
    "dpo, continued, plain": dict(kind="plain", loss="dpo", model=steered),
    "bipo": dict(kind="dpo", loss="bipo"),
    "bipo, accumulated": dict(kind="dpo", loss="bipo", gradient_accumulation_steps=2, per_device_train_batch_size=2),
    "bipo, evaluated": dict(kind="dpo", loss="bipo", eval_strategy="steps", eval_steps=1, eval_dataset=pairs(3)),
    "sft": dict(kind="sft", loss=None),
    "sft, cross-entropy": dict(kind="sft", loss="cross_entropy"),
    "direction": dict(
        kind="dpo",
        loss="dpo",
        peft_config=SteeringVectorConfig(init="mean_difference", norm="relative", norm_value=0.3),
    ),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", RESUMES)
def test_six_steps_are_three_and_three_more(name, tmp_path):
    options = dict(RESUMES[name])
    kind, model = options.pop("kind"), options.pop("model", tiny)
    options |= dict(max_steps=6, save_strategy="steps", save_steps=3, save_total_limit=2)
    whole = trained(kind, tmp_path, model=model(), **options)
    resumed = trainer(kind, tmp_path / "again", model=model(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(values(whole.model), values(resumed.model))
    assert history(whole, "step", "loss", "grad_norm") == history(resumed, "step", "loss", "grad_norm")
    last = [entry for entry in history(whole, "step", "vector/norm") if entry["step"] > 3]
    assert last == [entry for entry in history(resumed, "step", "vector/norm") if entry["step"] > 3]
    assert len(set(losses(whole))) == 6


def test_evaluation_does_not_change_what_bipo_draws(tmp_path):
    quiet, evaluated = Spy(), Spy()
    options = dict(max_steps=12, gradient_accumulation_steps=2, per_device_train_batch_size=1)
    first = trained("dpo", tmp_path, loss=quiet, **options)
    made = trainer("dpo", tmp_path, loss=evaluated, eval_dataset=pairs(4), **options)
    evaluations = [made.evaluate()["eval_loss"] for _ in range(2)]
    assert evaluations[0] == evaluations[1]
    before = len(evaluated.drawn)
    made.train()
    assert evaluated.drawn[before:] == quiet.drawn and same(values(first.model), values(made.model))
    options |= dict(eval_strategy="steps", eval_steps=1, eval_dataset=pairs(4))
    assert same(values(trained("dpo", tmp_path, loss="bipo", **options).model), values(first.model))


# -- gradient accumulation ------------------------------------------------------------------------------------------


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("kind", "loss"),
    [("dpo", "dpo"), ("dpo", "ipo"), ("plain", "simpo"), ("dpo", "unlikelihood"), ("dpo", "cross_entropy"),
     ("sft", "cross_entropy"), ("plain", "cross_entropy"), ("sft", None)],
)  # fmt: skip
def test_four_times_one_is_one_times_four(kind, loss, tmp_path):
    options = dict(loss=loss, data=data_for(kind), **GRADIENT_DESCENT)
    at_once = trained(kind, tmp_path, per_device_train_batch_size=4, **options)
    in_parts = trained(kind, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    assert losses(in_parts) == pytest.approx(losses(at_once), abs=1e-6, rel=1e-6)
    [whole], [parts] = values(at_once.model).values(), values(in_parts.model).values()
    assert whole.norm() > 1e-3
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)


# -- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [lambda data: data, conversational], ids=["standard", "conversational"])
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_answers_and_nothing_else(kind, adds_bos, form, tmp_path):
    data, words = data_for(kind), tokenizer(adds_bos)
    made = trainer(kind, tmp_path, data=form(data), loss="cross_entropy", processing_class=words)
    batch = Batch.read(made.data_collator([made.train_dataset[i] for i in range(8)]))
    decoded = [words.decode(row[row != -100]) for row in batch.labels]
    columns = ["completion"] if kind == "sft" else ["chosen", "rejected"]
    assert decoded == [f"{text} </s>" for column in columns for text in data[column]]
    conversation = form is conversational
    for ids in batch.inputs["input_ids"].tolist():
        assert ids.count(1) == (1 if adds_bos or conversation else 0), "exactly one BOS if there is one"
        assert (ids[0] == 1) == (adds_bos or conversation)


# -- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "loss"), TRAININGS)
def test_vectors_stay_fp32_on_a_bf16_base(kind, loss, tmp_path):
    model = steered(tiny().bfloat16(), stream_sizes={})
    with torch.no_grad():
        vector_of(model).fill_(2.001)
    made = trained(kind, tmp_path, model=model, loss=loss, learning_rate=1e-4, optim="sgd", max_grad_norm=0.0)
    vector = vector_of(made.model)
    assert vector.dtype == torch.float32 and made.model.get_output_embeddings().weight.dtype == torch.bfloat16
    moved = (vector - 2.001).abs()
    assert 0 < moved.max() < 0.004, "smaller steps than bf16 can take at 2"


@pytest.fixture(scope="module", params=[4, 8])
def quantised(request, tmp_path_factory):
    load = quantised_tiny(request.param, tmp_path_factory.mktemp("base"))
    try:
        model = load()
        with torch.no_grad():
            model(torch.tensor([[6, 7, 8]]))
    except Exception as error:
        pytest.skip(f"bitsandbytes does not work here: {error}")
    assert getattr(model, f"is_loaded_in_{request.param}bit")
    return load


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("kind", "loss"), TRAININGS)
def test_vectors_stay_fp32_and_keep_their_value_on_a_quantised_base(kind, loss, quantised, tmp_path):
    model = get_peft_model(quantised(), SteeringVectorConfig())
    with torch.no_grad():
        vector_of(model).copy_(torch.linspace(-0.1, 0.1, 32) + 0.001)
    before = vector_of(model).clone()
    assert not torch.equal(before, before.bfloat16().float()), "bf16 would round it"
    made = trainer(kind, tmp_path, model=model, loss=loss, **{**GRADIENT_DESCENT, "learning_rate": 1e-3})
    assert torch.equal(vector_of(made.model), before) and vector_of(made.model).dtype == torch.float32
    made.train()
    assert vector_of(made.model).dtype == torch.float32 and not torch.equal(vector_of(made.model), before)
    if kind != "sft":
        assert losses(made)[0] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_fresh_vector_on_a_quantised_base_is_fp32(kind, quantised, tmp_path):
    made = trained(kind, tmp_path, model=quantised(), loss=None)
    assert vector_of(made.model).dtype == torch.float32
    assert not torch.equal(vector_of(made.model), vector_of(made.model).bfloat16().float())


# -- positions and gradient checkpointing ---------------------------------------------------------------------------


@pytest.mark.thinned(3)
@pytest.mark.parametrize("positions", ["completion", "prompt", "last_prompt"])
@pytest.mark.parametrize(("kind", "loss"), TRAININGS)
def test_steering_a_part_of_the_tokens_trains_in_every_trainer(kind, loss, positions, tmp_path):
    everywhere = trained(kind, tmp_path, loss=loss)
    made = trained(
        kind, tmp_path, loss=loss, peft_config=SteeringVectorConfig(positions=positions),
        eval_dataset=data_for(kind, 4),
    )  # fmt: skip
    assert vector_of(made.model).norm() > 0.1 and losses(made) != losses(everywhere)
    assert math.isfinite(made.evaluate()["eval_loss"])


@pytest.mark.parametrize(
    ("kind", "loss"), [("plain", "cross_entropy"), ("plain", "dpo"), ("dpo", None), ("sft", None)]
)
def test_a_callers_metrics_see_the_same_steered_tokens(kind, loss, tmp_path):
    data = pairs(4) if "dpo" in (kind, loss) else demonstrations(4)
    config = SteeringVectorConfig(positions="completion")
    options = dict(data=data, eval_dataset=data, loss=loss, peft_config=config)
    expected = trained(kind, tmp_path, **options).evaluate()["eval_loss"]
    made = trained(kind, tmp_path, compute_metrics=lambda given: {"rows": len(given.label_ids)}, **options)
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("positions", ["completion", "last_prompt"])
def test_our_loss_and_trls_agree_on_where_the_prompt_ends(positions, tmp_path):
    config = SteeringVectorConfig(positions=positions)
    ours, theirs = (trained("dpo", tmp_path, loss=loss, peft_config=config) for loss in ("dpo", None))
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-6)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("kind", "loss", "site"),
    [(*training, site) for training in TRAININGS[::2] for site in ("block", "attention", "mlp")]
    + [("dpo", None, "block"), ("sft", None, "mlp"), ("dpo", "bipo", "block")],
)
def test_gradient_checkpointing_changes_nothing(kind, loss, site, tmp_path):
    if loss == "bipo" and "__call__" in vars(GradientCheckpointingLayer):
        pytest.skip("before transformers 5.23 the hooks of a block are recomputed as well, so it is refused")
    config = SteeringVectorConfig(site=site, form="gated")
    # at a rate of 0.25 the vector is five times as long as the stream, and rounding grows with every step
    options = dict(loss=loss, peft_config=config, max_steps=6, **GRADIENT_DESCENT | {"learning_rate": 0.025})
    without = trained(kind, tmp_path, gradient_checkpointing=False, **options)
    checkpointed = trainer(kind, tmp_path, gradient_checkpointing=True, **options)
    calls = count_calls(checkpointed)
    checkpointed.train()
    assert losses(checkpointed) == pytest.approx(losses(without), rel=2e-6)
    for name, value in values(without.model).items():
        torch.testing.assert_close(values(checkpointed.model)[name], value, atol=2e-6, rtol=2e-5)
    assert len(calls) > 6 * (2 if loss in ("dpo", "bipo") or kind == "dpo" else 1), "layers were not recomputed"


def count_calls(made) -> list:
    calls = []
    norm = made.model.get_base_model().model.layers[0].input_layernorm
    norm.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.thinned(2)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("config", [SteeringVectorConfig(site="mlp"), LoraConfig(r=2)], ids=["mlp", "lora"])
def test_bipo_with_checkpointing_inside_a_block_is_refused_at_the_first_step(config, seed, tmp_path):
    made = trainer("dpo", tmp_path, loss="bipo", peft_config=config, gradient_checkpointing=True, seed=seed)
    with pytest.raises(ValueError, match="gradient_checkpointing=False"):
        made.train()
    assert made.state.global_step == 0
    trained("dpo", tmp_path, loss="bipo", peft_config=config, seed=seed)


# -- what is logged -------------------------------------------------------------------------------------------------


VECTOR = {"vector/norm", "vector/share_of_residual"}
COSINES = {"vector/cos_init", "vector/cos_mean_difference"}
MARGINS = {"margin", "pair_accuracy"}


@pytest.mark.parametrize("kind", KINDS)
def test_logged_keys(kind, tmp_path):
    init = "zeros" if kind == "sft" else "mean_difference"
    made = trained(
        kind, tmp_path, loss=loss_for(kind), peft_config=SteeringVectorConfig(init=init),
        eval_dataset=data_for(kind, 4),
    )  # fmt: skip
    made.evaluate()
    *steps, summary, evaluation = history(made)
    expected = VECTOR if kind == "sft" else VECTOR | COSINES | MARGINS | {"margin_gain"}
    assert len(steps) == 3
    for step in steps:
        assert expected <= set(step) and all(math.isfinite(step[name]) for name in expected)
    assert not (VECTOR | MARGINS) & set(summary)
    expected = set() if kind == "sft" else {"eval_margin", "eval_margin_gain", "eval_pair_accuracy"}
    assert {"eval_loss"} | expected <= set(evaluation) and not VECTOR & set(evaluation)


def test_logged_numbers_are_what_they_say(tmp_path):
    made = trained("dpo", tmp_path, loss="dpo", max_steps=1, eval_dataset=pairs())
    vector = vector_of(made.model).detach()
    [step] = history(made, "vector/norm", "vector/share_of_residual", "vector/cos_mean_difference")
    batches = [made.data_collator([made.train_dataset[i] for i in range(8)])]
    direction = directions.compute("mean_difference", tiny(), batches, [2])
    assert step["vector/norm"] == pytest.approx(float(vector.norm()))
    assert step["vector/share_of_residual"] == pytest.approx(
        float(vector.norm()) / made.model.peft_config["default"].stream_sizes["2"]
    )
    cosine = torch.cosine_similarity(vector, direction.vectors[2], dim=0)
    assert step["vector/cos_mean_difference"] == pytest.approx(float(cosine), abs=1e-5)
    metrics = made.evaluate()
    batch = Batch.read(batches[0])
    from steertune.trainers.model_at import token_logps

    made.model.eval()
    outputs = token_logps(made.model, made.model, batch)
    margin = outputs.chosen.logps - outputs.rejected.logps
    assert metrics["eval_margin"] == pytest.approx(margin.mean().item(), abs=1e-4)
    assert metrics["eval_pair_accuracy"] == (margin > 0).float().mean().item()


def test_evaluation_margins_hold_no_training_margins(tmp_path):
    options = dict(loss="dpo", eval_dataset=pairs(4, seed=5), max_steps=4, eval_strategy="steps", eval_steps=2)
    rarely, often = (trained("dpo", tmp_path, logging_steps=n, **options) for n in (4, 1))
    assert history(rarely, "eval_margin", "eval_pair_accuracy") == history(often, "eval_margin", "eval_pair_accuracy")
    [logged] = history(rarely, "margin")
    every = [entry["margin"] for entry in history(often, "margin")]
    assert logged["margin"] == pytest.approx(sum(every) / 4, rel=1e-5)


# -- vectors that start from data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "dpo"])
def test_mean_difference_is_there_before_the_first_step(kind, tmp_path):
    config = SteeringVectorConfig(init="mean_difference", init_scale=0.5, layers=[1, 3])
    made = trained(kind, tmp_path, loss="dpo", peft_config=config, learning_rate=0.0, max_steps=1)
    batches = [made.data_collator([made.train_dataset[i] for i in range(8)])]
    direction = directions.compute("mean_difference", tiny(), batches, [1, 3])
    for layer, vector in zip((1, 3), values(made.model).values(), strict=True):
        torch.testing.assert_close(vector, 0.5 * direction.vectors[layer], atol=1e-6, rtol=1e-5)
        assert vector.norm() > 0
    assert losses(made)[0] != pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_relative_norm_works_in_every_trainer(kind, tmp_path):
    config = SteeringVectorConfig(norm="relative", norm_value=0.25, init="random", layers=1)
    made = trained(kind, tmp_path, loss=loss_for(kind), peft_config=config)
    batches = [made.data_collator([made.train_dataset[i] for i in range(8)])]
    expected = directions.collect(tiny(), batches, [1]).residual_norms[1]
    ids = torch.tensor([[6, 7, 8, 9]])
    with torch.no_grad():
        moved = [m.eval()(ids, output_hidden_states=True).hidden_states[2] for m in (made.model, tiny())]
    length = (moved[0] - moved[1]).norm(dim=-1)
    torch.testing.assert_close(length, torch.full_like(length, 0.25 * expected), rtol=1e-4, atol=0)


def test_a_direction_from_demonstrations_is_refused(tmp_path):
    made = trainer("sft", tmp_path, peft_config=SteeringVectorConfig(init="mean_difference"))
    with pytest.raises(ValueError, match="computed from pairs .* Use init='zeros'"):
        made.train()
    assert made.state.global_step == 0


# -- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_gives_the_trained_model(kind, tmp_path):
    made = trained(kind, tmp_path, loss=loss_for(kind))
    made.save_model(str(tmp_path / "saved"))
    assert "adapter_model.safetensors" in os.listdir(tmp_path / "saved")
    again = PeftModel.from_pretrained(tiny(), str(tmp_path / "saved"))
    assert torch.equal(vector_of(again), vector_of(made.model)) and vector_of(again).norm() > 0
