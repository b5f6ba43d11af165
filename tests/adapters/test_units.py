"""A learning rate of a vector means the same whatever the size of the residual stream."""

from __future__ import annotations

import copy
import logging
import math
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_data import arguments, history, losses, pairs, tokenizer, trained, trainer
from tiny_models import steered, tiny, tokens, vector_of
from transformers import Trainer
from trl import DPOTrainer, SFTConfig

from steertune.adapters import SteeringVectorConfig, steering_layers
from steertune.adapters.units import STEP_SHARE
from steertune.trainers import CheckpointError
from steertune.trainers.rates import describe_rates

FORMS = ["bias", "gated", "linear", "low_rank"]


def scaled(factor: float, model_type: str = "llama") -> torch.nn.Module:
    """The same model with a residual stream `factor` times as large: whatever is written into it is."""
    model = tiny(model_type, tie_word_embeddings=False, rms_norm_eps=1e-12)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
                parameter.mul_(factor)
    return model


def shares(model: torch.nn.Module) -> list[torch.Tensor]:
    """Every vector over the size of the stream at its layer."""
    return [
        layer.written("default").detach() / layer.config["default"].stream_sizes[str(layer.layer_index)]
        for layer in steering_layers(model)
    ]


@pytest.mark.parametrize("factor", [10.0, 100.0])
@pytest.mark.parametrize(
    "switches",
    [
        *(dict(form=form, rank=3 if form == "low_rank" else 1) for form in FORMS),
        dict(layers="all"),
        dict(layers="all", tied=True),
        dict(site="attention"),
        dict(site="mlp", layers=[0, 3]),
        dict(norm="preserve"),
        dict(norm="relative", norm_value=0.3, init="random"),
        dict(init="mean_difference"),
    ],
    ids=str,
)
def test_a_larger_stream_gives_the_same_trajectory(switches, factor, tmp_path):
    made = [
        trained("dpo", tmp_path, model=scaled(size), peft_config=SteeringVectorConfig(**switches), learning_rate=0.01)
        for size in (1.0, factor)
    ]
    first, second = made
    assert losses(first) == pytest.approx(losses(second), rel=1e-4) and losses(first)[-1] < 0.693
    for mine, other in zip(shares(first.model), shares(second.model), strict=True):
        assert mine.norm() > 1e-3
        torch.testing.assert_close(mine, other, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adagrad", "rmsprop"])
@pytest.mark.parametrize("stock", [False, True])
def test_for_every_optimiser_with_decay_and_clipping_and_in_stock_trainers(stock, optim, tmp_path):
    """Momentum, weight decay and the norm that gradients are clipped to are seen in the same units."""
    changes = dict(optim=optim, weight_decay=0.1, max_grad_norm=0.1, learning_rate=0.02, max_steps=6)
    made = []
    for factor in (1.0, 10.0, 100.0):
        kind = DPOTrainer if stock else None
        if kind is None:
            one = trained("dpo", tmp_path, model=scaled(factor), peft_config=SteeringVectorConfig(), **changes)
        else:
            one = kind(
                model=scaled(factor), args=arguments("dpo", tmp_path, **changes), train_dataset=pairs(),
                processing_class=tokenizer(), peft_config=SteeringVectorConfig(),
            )  # fmt: skip
            one.train()
        made.append(one)
    for other in made[1:]:
        assert losses(made[0]) == pytest.approx(losses(other), rel=1e-4)
        torch.testing.assert_close(shares(made[0].model)[0], shares(other.model)[0], rtol=2e-3, atol=1e-5)


def test_the_unit_is_a_share_of_the_stream_whatever_its_width():
    model = get_peft_model(tiny(), SteeringVectorConfig())
    [layer] = steering_layers(model)
    size = layer.config["default"].stream_sizes["2"]
    unit = layer.steering_vector_v["default"].unit
    assert unit == pytest.approx(STEP_SHARE * size / math.sqrt(32))
    optimizer = torch.optim.AdamW([vector_of(model)], lr=1e-3, weight_decay=0.0)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    # AdamW's first step is its learning rate long in every entry
    assert float(vector_of(model).detach().norm()) == pytest.approx(1e-3 * STEP_SHARE * size, rel=1e-3)


def test_all_layers_share_the_move_of_one():
    units = [
        steering_layers(get_peft_model(tiny(), SteeringVectorConfig(layers=layers)))[0].steering_vector_v["default"]
        for layers in ([0], "all")
    ]
    assert units[0].unit == pytest.approx(4 * units[1].unit)


def test_the_size_is_that_of_the_blocks_median_token_and_leaves_the_model_as_it_was():
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    model.train()
    state = torch.get_rng_state()
    config = SteeringVectorConfig(layers=1)
    adapted = get_peft_model(model, config)
    assert torch.equal(torch.get_rng_state(), state) and all(
        module.training for module in adapted.base_model.modules()
    )
    assert all(torch.equal(value, adapted.base_model.model.state_dict()[name]) for name, value in before.items())
    ids = (torch.arange(128) * 7919 + 101).view(2, 64) % 64
    states = model.eval()(ids, output_hidden_states=True).hidden_states[2][:, 4:]
    # one entry of 32 in the middle is the median, and 0.6745 that of a standard normal variable
    medians = states.abs().median(dim=-1).values * math.sqrt(32) / 0.6745
    assert adapted.peft_config["default"].stream_sizes["1"] == pytest.approx(float(medians.median()), rel=1e-2)


def test_massive_entries_of_the_stream_do_not_count():
    """In Gemma-3-270M a few entries are four fifths of the stream's norm on every token, and say nothing of it."""
    model = tiny()
    plain = get_peft_model(copy.deepcopy(model), SteeringVectorConfig(layers=1)).peft_config["default"].stream_sizes
    with torch.no_grad():
        # a constant in an entry that no block reads
        model.model.embed_tokens.weight[:, 5] = 50 * plain["1"]
        for block in model.model.layers:
            block.input_layernorm.weight[5] = block.post_attention_layernorm.weight[5] = 0
    massive = get_peft_model(model, SteeringVectorConfig(layers=1)).peft_config["default"].stream_sizes
    assert massive["1"] == pytest.approx(plain["1"], rel=0.5)


def test_behind_a_norm_or_a_factor_the_size_is_what_moves_the_stream():
    """Gemma writes attention through a norm into the stream: lengths there have nothing to do with the stream's."""
    model = tiny("gemma3_text")
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(50)  # the norm behind it takes that away
    scaled_up, plain = (
        get_peft_model(m, SteeringVectorConfig(site="attention", layers=1)).peft_config["default"].stream_sizes["1"]
        for m in (model, tiny("gemma3_text"))
    )
    assert scaled_up / plain == pytest.approx(50, rel=0.02)


def test_the_parameter_holds_the_vector_at_all_times_but_in_a_step():
    model = steered(seed=3)
    vector = vector_of(model)
    before = vector.detach().clone()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert torch.equal(vector.detach(), before)
    frozen = torch.optim.AdamW([vector], lr=0.0, weight_decay=0.0)
    frozen.step()
    assert torch.equal(vector.detach(), before), "a step that moves nothing leaves every bit"
    vector.grad = None
    torch.optim.SGD([vector], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(vector.detach(), before), "without a gradient there is no step"


def test_a_closure_runs_the_model_with_the_same_vector():
    """Lightning and LBFGS compute the gradient inside of `step`."""
    inside, outside = steered(seed=3), steered(seed=3)
    optimizers = [torch.optim.SGD([vector_of(model)], lr=1e-3) for model in (inside, outside)]
    ids = tokens()

    def closure():
        loss = inside(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    value = optimizers[0].step(closure)
    loss = outside(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizers[1].step()
    assert float(value) == pytest.approx(float(loss), rel=1e-6)
    torch.testing.assert_close(vector_of(inside), vector_of(outside))


def test_a_copied_model_trains_in_the_same_units():
    model = steered(seed=3)
    other = copy.deepcopy(model)
    for one in (model, other):
        optimizer = torch.optim.AdamW([vector_of(one)], lr=1e-2)
        one(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    assert torch.equal(vector_of(model), vector_of(other))


def test_optimisers_that_average_outside_of_steps_are_refused():
    class Averaging(torch.optim.SGD):
        def eval(self):
            pass

    model = steered()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    with pytest.raises(ValueError, match="averages parameters outside"):
        Averaging([vector_of(model)], lr=0.1).step()


def test_without_sizes_learning_rates_are_absolute():
    model = get_peft_model(tiny(), SteeringVectorConfig(stream_sizes={}))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    torch.optim.AdamW([vector_of(model)], lr=1e-3, weight_decay=0.0).step()
    torch.testing.assert_close(vector_of(model).detach().abs(), torch.full((32,), 1e-3), atol=1e-5, rtol=0)


def test_sizes_are_saved_and_an_adapter_without_them_gets_them(tmp_path):
    model = steered()
    sizes = model.peft_config["default"].stream_sizes
    model.save_pretrained(tmp_path / "new")
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "new")
    assert loaded.peft_config["default"].stream_sizes == sizes
    assert torch.equal(vector_of(loaded), vector_of(model)), "files hold the vector itself"
    config = SteeringVectorConfig.from_pretrained(str(tmp_path / "new"))
    config.stream_sizes = None  # as saved before there were any
    config.save_pretrained(tmp_path / "new")
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "new", is_trainable=True)
    assert loaded.peft_config["default"].stream_sizes == sizes
    assert torch.equal(vector_of(loaded), vector_of(model))


# -- the trainers' rule ---------------------------------------------------------------------------------------------


def lines(caplog, *args, **options) -> str:
    """What a training says at its start."""
    with caplog.at_level(logging.INFO, logger="steertune"):
        trained(*args, **options)
    return caplog.text


@pytest.mark.parametrize("kind", ["plain", "sft", "dpo"])
def test_the_default_rate_of_the_parent_is_not_a_vectors(kind, tmp_path, caplog):
    args = arguments(kind, tmp_path)
    default = type(args)(output_dir=str(tmp_path)).learning_rate if kind == "plain" else None
    default = {"plain": default, "sft": SFTConfig.learning_rate, "dpo": 1e-6}[kind]
    loss = "cross_entropy" if kind == "plain" else None
    text = lines(caplog, kind, tmp_path, loss=loss, learning_rate=default, lr_scheduler_type="constant")
    assert "Learning rate 0.001 (the default for vectors" in text
    assert "3 steps can move it by up to 19% of the residual stream" in text
    assert "Training 32 of 35,136 parameters: steering vector 'default' at layer 2." in text


def test_cards_and_errors_give_the_rate_of_vectors(tmp_path):
    """Not that of the arguments, which is 1e-6 in DPO's defaults."""
    made = trainer("dpo", tmp_path, learning_rate=1e-6)
    assert describe_rates(made) == "learning rate 0.001"
    made = trainer("dpo", tmp_path, learning_rate=1e-6, vector_learning_rate=0.5)
    made.create_optimizer()
    assert describe_rates(made) == "learning rate 0.5"
    made.model.get_output_embeddings().weight.requires_grad_(True)
    assert describe_rates(made) == "learning rate 0.5 for vectors and 1e-06 for the rest"


def test_a_rate_that_the_user_chose_is_kept_and_logged(tmp_path, caplog):
    made = trainer("dpo", tmp_path, learning_rate=2e-4, lr_scheduler_type="constant")
    with caplog.at_level(logging.INFO, logger="steertune"):
        made.train()
    assert "Learning rate 0.0002 (learning_rate)" in caplog.text
    assert all(entry["learning_rate"] == 2e-4 for entry in history(made, "learning_rate"))


def test_vector_learning_rate_is_the_vectors_alone(tmp_path):
    """Whatever else is trained keeps `learning_rate`."""
    config = SteeringVectorConfig(layers=[0, 2], modules_to_save=["lm_head"])
    made = trainer("dpo", tmp_path, peft_config=config, vector_learning_rate=3e-3, learning_rate=1e-4)
    rates = sorted(group["lr"] for group in made.create_optimizer().param_groups)
    assert rates == [1e-4, 3e-3, 3e-3], "two layers have two units"


@pytest.mark.parametrize("rate, problem", [(1e-6, "this cannot change much"), (0.1, "usually destroys")])
def test_a_rate_that_cannot_work_is_said_with_numbers(rate, problem, tmp_path, caplog):
    text = lines(caplog, "dpo", tmp_path, learning_rate=rate * 1.001)
    assert problem in text and "%" in text


@pytest.mark.parametrize("rate", [0, -1e-3, math.nan, math.inf, "1e-3", True])
def test_a_vector_learning_rate_that_is_none_is_refused(rate, tmp_path):
    with pytest.raises(ValueError, match="vector_learning_rate=.* must be a finite number above 0"):
        trainer("dpo", tmp_path, vector_learning_rate=rate)


def test_an_optimizer_of_the_users_own_keeps_its_rate(tmp_path, caplog):
    def made(**options):
        model = get_peft_model(tiny(), SteeringVectorConfig())
        own = torch.optim.AdamW([vector_of(model)], lr=2e-3)
        return trainer("dpo", tmp_path, model=model, optimizers=(own, None), **options)

    with caplog.at_level(logging.INFO, logger="steertune"):
        made().train()
    assert "Learning rate 0.002 (the optimizer's own)" in caplog.text
    with pytest.raises(ValueError, match="an optimizer of your own"):
        made(vector_learning_rate=1e-3).train()


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise", "schedule_free_adamw"])
def test_optimizers_that_work_outside_of_their_steps_are_refused_before_training(optim, tmp_path):
    with pytest.raises(ValueError, match=f"optim='{optim}' changes parameters outside of optimizer.step"):
        trainer("dpo", tmp_path, optim=optim).train()


def test_trls_script_without_an_adapter_says_that_it_trains_everything(tmp_path, caplog):
    """`peft_config=get_peft_config(model_args)` is None without `--use_peft`."""
    text = lines(caplog, "sft", tmp_path, peft_config=None, learning_rate=1e-5)
    assert "Training 35,104 of 35,104 parameters of LlamaForCausalLM: full finetuning, no adapter." in text


def test_what_is_trained_is_said_for_full_finetuning_too(tmp_path, caplog):
    text = lines(caplog, "plain", tmp_path, peft_config=None, loss="cross_entropy", learning_rate=1e-5)
    assert "Training 35,104 of 35,104 parameters of LlamaForCausalLM: full finetuning, no adapter." in text
    assert "Learning rate" not in text


def test_a_checkpoint_of_absolute_rates_is_refused(tmp_path):
    made = trained("dpo", tmp_path / "a", save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "a" / "checkpoint-2"
    assert made.state.global_step == 3 and checkpoint.is_dir()
    old = tmp_path / "old" / "checkpoint-2"
    shutil.copytree(checkpoint, old)
    config = SteeringVectorConfig.from_pretrained(str(checkpoint))
    config.stream_sizes = None
    config.save_pretrained(old)
    (old / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match="absolute learning rate"):
        trainer("dpo", tmp_path / "b").train(resume_from_checkpoint=str(old))


def test_resuming_goes_on_in_the_units_of_the_checkpoint(tmp_path):
    trained("dpo", tmp_path / "a", save_strategy="steps", save_steps=2)
    made = trainer("dpo", tmp_path / "b")
    measured = made.model.peft_config["default"].stream_sizes
    made.model.base_model.set_stream_sizes("default", {"2": 123.0})  # as if measured on another machine
    made.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert made.model.peft_config["default"].stream_sizes == measured


def test_the_plain_trainer_without_us_learns_with_a_rate_of_lora(tmp_path):
    """transformers' own Trainer on a PEFT model: the unit comes with the adapter."""
    model = get_peft_model(tiny(), SteeringVectorConfig())
    rows = [dict(input_ids=row.tolist(), labels=row.tolist()) for row in tokens(8)]
    made = Trainer(model=model, args=arguments("plain", tmp_path, learning_rate=1e-3), train_dataset=rows)
    made.train()
    [share] = shares(model)
    assert 0.03 < float(share.norm()) < 3 * STEP_SHARE * 1e-3
