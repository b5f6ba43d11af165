"""Where the frozen prefix would be wrong it is off, and says why."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import get_peft_model
from prefixes import (
    assert_equal,
    assert_same_with_shortcut,
    both_ways,
    off_because,
    pair_batch,
    with_gradients,
)
from tiny_data import demonstrations, pairs, trained
from tiny_models import fill, of_the_prefix, tiny

from steertune.adapters import SteeringVectorConfig
from steertune.trainers import FrozenPrefix, ModelAt


@pytest.fixture(autouse=True)
def hears_everything(caplog):
    caplog.set_level(logging.INFO, logger="steertune.trainers.prefix")


def test_a_trained_embedding_is_off(caplog):
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=2, modules_to_save=["embed_tokens"]))
    fill(model)
    assert_same_with_shortcut(model, pair_batch())
    off_because(caplog, "embed_tokens below the trained layers has an adapter")


def test_nothing_below_layer_0(caplog):
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=0, site="mlp"))
    assert FrozenPrefix().shortcut(model, True).skipped == 0
    off_because(caplog, "nothing lies below it")


def test_embeddings_and_hidden_states_take_the_plain_path(caplog):
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=2)).eval()
    fill(model)
    ids = pair_batch().inputs["input_ids"]
    embedded = model.get_input_embeddings()(ids).detach()
    for kwargs in (dict(inputs_embeds=embedded), dict(input_ids=ids, output_hidden_states=True)):
        expected = model(**kwargs, use_cache=False)
        with FrozenPrefix().shortcut(model).on():
            found = model(**kwargs, use_cache=False)
        assert torch.equal(found.logits, expected.logits)
        for mine, other in zip(found.hidden_states or (), expected.hidden_states or (), strict=True):
            assert torch.equal(mine, other)
    off_because(caplog, "the call has no input_ids")
    off_because(caplog, "output_hidden_states needs all layers")


def test_a_model_whose_upper_layers_read_lower_ones_is_caught(caplog):
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=2)).eval()
    fill(model)
    stack, kept = model.get_base_model().model, []
    lower = stack.layers[0].self_attn.forward

    def keep(*args, **kwargs):
        found = lower(*args, **kwargs)
        kept.append(found[0])
        return found

    stack.layers[0].self_attn.forward = keep
    stack.layers[3].mlp.register_forward_hook(lambda m, a, out: out + kept[-1] if kept else out)
    stack.layers[3].register_forward_hook(lambda m, a, out: kept.clear())
    assert_same_with_shortcut(model, pair_batch(), training=False)
    off_because(caplog, "the cache of the lower layers is off: LlamaModel differs by")


@pytest.mark.parametrize("looked_at_first_in", ["training", "evaluation"])
def test_noise_on_embeddings_is_off(looked_at_first_in, tmp_path, caplog):
    """NEFTune adds noise in training only: a memo would repeat one draw of it, or none."""
    options = dict(loss="cross_entropy", neftune_noise_alpha=5.0)
    if looked_at_first_in == "evaluation":
        options |= dict(
            eval_dataset=demonstrations(4, seed=9), eval_strategy="steps", eval_steps=1, eval_on_start=True
        )
    ours, plain, _ = both_ways("sft", tmp_path, **options)
    assert_equal(ours, plain)
    off_because(caplog, "what runs below the trained layers differs in training")


@pytest.mark.parametrize("change", ["unfreezing", "another adapter"])
def test_what_changes_during_a_run_is_noticed(change, caplog):
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=2))
    fill(model)
    shortcut = FrozenPrefix().shortcut(model, True)
    with torch.no_grad(), shortcut.on():
        ModelAt(model, model, pair_batch())(1)
    assert shortcut.skipped == 3
    if change == "unfreezing":
        model.get_base_model().model.layers[0].requires_grad_(True)
    else:
        model.add_adapter("lower", SteeringVectorConfig(layers=0))
        fill(model, "lower")
        model.base_model.set_adapter(["default", "lower"])
    plain, gradients = with_gradients(model, pair_batch(), None)
    ours, found = with_gradients(model, pair_batch(), shortcut)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    assert found.keys() == gradients.keys() and shortcut.skipped == 0
    off_because(caplog, "adapters, trained parameters or the mode have changed since it was made")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rope_that_depends_on_the_longest_row_is_off_beyond_its_context(kind, caplog):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = get_peft_model(
        tiny(rope_parameters=rope, max_position_embeddings=8), SteeringVectorConfig(layers=2)
    ).eval()
    fill(model)
    prefix = FrozenPrefix()
    short, long = pair_batch((3, 2), ((2, 2), (2, 1))), pair_batch((9, 3), ((4, 5), (3, 2)), seed=3)
    for batch in (short, long, short):
        with torch.no_grad():
            plain = ModelAt(model, model, batch)(1).token_logps
            with prefix.shortcut(model).on():
                ours = ModelAt(model, model, batch)(1).token_logps
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    off_because(caplog, "beyond 8 tokens this RoPE depends on the longest row of a batch")


@pytest.mark.parametrize("reentrant", [True, False, None])
def test_gradient_checkpointing_is_exact_and_reentrant_is_off(reentrant, tmp_path, caplog):
    given = None if reentrant is None else {"use_reentrant": reentrant}
    options = dict(loss="dpo", gradient_checkpointing=True, gradient_checkpointing_kwargs=given)
    ours, plain, prefix = both_ways("dpo", tmp_path, **options)
    assert_equal(ours, plain)
    if reentrant:
        off_because(caplog, "reentrant gradient checkpointing needs gradients of the embeddings")
    else:
        assert not of_the_prefix(caplog) and len(prefix.memo)


@pytest.mark.parametrize("wrong", ["yes", 1, 0.5])
def test_other_values_are_refused(wrong, tmp_path):
    with pytest.raises(TypeError, match="must be True, False, None or a FrozenPrefix"):
        trained("dpo", tmp_path, frozen_prefix=wrong)


NOWHERE = SteeringVectorConfig(layers="all", site="mlp")  # nothing lies below layer 0


def test_what_was_asked_for_warns_and_what_was_not_says_one_line(tmp_path, caplog):
    for asked, levels in (
        (None, [logging.WARNING]), (True, [logging.WARNING]), (FrozenPrefix(warn=False), [logging.INFO]), (False, [])
    ):  # fmt: skip
        caplog.clear()
        evaluated = dict(eval_dataset=pairs(4, seed=9), eval_strategy="steps", eval_steps=1)
        trained("dpo", tmp_path, frozen_prefix=asked, peft_config=NOWHERE, loss="dpo", **evaluated)
        assert [record.levelno for record in of_the_prefix(caplog)] == levels


@pytest.mark.parametrize(
    ("kind", "options", "why", "fix"),
    [
        ("dpo", dict(loss="dpo", peft_config=NOWHERE), "nothing lies below it", "layers="),
        ("dpo", dict(loss="dpo", gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
         "reentrant gradient checkpointing", "'use_reentrant': False"),
        ("sft", dict(loss="cross_entropy", neftune_noise_alpha=5.0), "differs in training", "frozen_prefix=False"),
        ("sft", dict(loss=None, neftune_noise_alpha=5.0), "differs in training", "frozen_prefix=False"),
        pytest.param("dpo", dict(loss="simpo", torch_compile=True, torch_compile_backend="eager"), "a compiled graph",
                     "torch_compile=False", marks=pytest.mark.slow),
        ("sft", dict(loss="cross_entropy", model="dropout"), "makes its output random", "Set it to 0"),
        ("sft", dict(loss="cross_entropy", peft_config=None), "is trained or adapted is 0", "layers="),
    ],
)  # fmt: skip
def test_one_visible_line_where_nobody_asked(kind, options, why, fix, tmp_path, caplog):
    if options.get("model") == "dropout":
        options = {**options, "model": tiny()}
        options["model"].model.layers[0].self_attn.attention_dropout = 0.1
    trained(kind, tmp_path, **options)
    [warning] = [
        record.getMessage()
        for record in of_the_prefix(caplog)
        if record.levelno >= logging.WARNING and record.name.startswith("steertune")
    ]
    assert why in warning and fix in warning and warning.startswith("The frozen prefix is off: ")
