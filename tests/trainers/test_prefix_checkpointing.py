"""Gradient checkpointing and the frozen prefix together: as the plain path, and nothing left out is run again."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from prefixes import assert_equal, complaints, fill_lora, pair_batch, with_gradients
from tiny_data import demonstrations, pairs, trained
from tiny_models import fill, of_the_prefix, tiny
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from steertune.adapters import SteeringVectorConfig, set_strength
from steertune.trainers import FrozenPrefix, ModelAt
from steertune.trainers.prefix import checkpointing
from steertune.trainers.prefix.decoder import Decoder
from steertune.trainers.views import get_view


@pytest.fixture(autouse=True)
def hears_everything(caplog):
    caplog.set_level(logging.INFO, logger="steertune.trainers.prefix")


def checkpointed(model, **kwargs):
    """The model in training mode, as trainers set it up for checkpointing."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **kwargs})
    model.enable_input_require_grads()
    return model.train()


def steered(base=None, **switches):
    model = get_peft_model(base or tiny(), SteeringVectorConfig(**switches))
    fill(model)
    return model.train()


def with_labels_only(model, batch, shortcut):
    """As `with_gradients`, reading nothing before the last prompt token."""
    model.zero_grad()
    with shortcut.on(labels_only=True):
        outputs = ModelAt(model, model, batch)(1)
    outputs.token_logps.square().sum().backward()
    return outputs.token_logps.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_exact(make, batch=None) -> None:
    """With checkpointing and the prefix, filling it and reading it, as without either."""
    batch = batch or pair_batch()
    expected, gradients = with_gradients(make(), batch, None)
    model = checkpointed(make())
    prefix = FrozenPrefix()
    for run in (with_gradients, with_labels_only):
        for _ in range(2):
            found, own = run(model, batch, prefix.shortcut(model, training=True))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            assert own.keys() == gradients.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(own[name], gradient, atol=1e-5, rtol=1e-4)
    assert len(prefix.memo)
    assert all(not module.gradient_checkpointing or module.training for module in model.modules()
               if isinstance(module, GradientCheckpointingLayer))  # fmt: skip


@pytest.mark.thinned(3, whole=["llama"])
@pytest.mark.parametrize("positions", ["all", "completion", "prompt", "last_prompt"])
def test_exact_on_every_architecture(architecture, positions, caplog):
    assert_exact(lambda: steered(tiny(architecture), layers=1, positions=positions))
    assert not complaints(caplog)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("positions", ["all", "completion", "prompt", "last_prompt"])
@pytest.mark.parametrize("site", ["attention", "mlp"])
@pytest.mark.parametrize("form", ["bias", "gated", "low_rank"])
def test_sites_inside_a_block_are_steered_again_where_they_were(site, positions, form):
    rank = {"rank": 2} if form == "low_rank" else {}
    assert_exact(lambda: steered(layers=[1, 2], site=site, positions=positions, form=form, **rank))


@pytest.mark.parametrize("norm", [dict(norm="preserve"), dict(norm="capped", norm_value=0.5)])
def test_norms(norm):
    assert_exact(lambda: steered(layers=[1, 3], form="gated", **norm))


def test_lora_in_upper_layers():
    def make():
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=[2, 3])
        model = get_peft_model(tiny(), config)
        fill_lora(model)
        return model.train()

    assert_exact(make)


def test_what_is_left_out_is_not_run_again_and_prompts_are_shared():
    model, batch = checkpointed(steered(layers=1)), pair_batch()
    shortcut = FrozenPrefix().shortcut(model, training=True)
    with_gradients(model, batch, shortcut)
    ran = []
    for block in model.get_base_model().model.layers:  # no hooks, which would turn the memo off
        plain = block.self_attn.forward
        block.self_attn.forward = lambda *a, i=block.self_attn.layer_idx, f=plain, **k: (ran.append(i), f(*a, **k))[1]
    with set_checkpoint_early_stop(False):
        with_gradients(model, batch, shortcut)
    assert sorted(ran) == [2] * 2 + [3] * 2, "all rows in one line, once and once again"


def test_activations_are_not_kept(monkeypatch):
    """What checkpointing is for."""
    sizes = {}
    for name, make in (("kept", lambda: steered(layers=1)), ("checkpointed", lambda: checkpointed(steered(layers=1)))):
        model, batch = make(), pair_batch()
        shortcut = FrozenPrefix().shortcut(model, training=True)
        with_gradients(model, batch, shortcut)
        saved = []
        noting = torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.append(x.numel()) or x, lambda x: x)
        with noting, shortcut.on():
            ModelAt(model, model, batch)(1)
        sizes[name] = sum(saved)
    assert sizes["checkpointed"] < 0.6 * sizes["kept"]


OPTIONS = {
    "sft": ("sft", dict(loss="cross_entropy")),
    "sft of TRL": ("sft", dict(loss=None)),
    "dpo": ("dpo", dict(loss="dpo")),
    "dpo of TRL": ("dpo", dict(loss=None)),
    "plain": ("plain", dict(loss="dpo")),
    "bipo": ("dpo", dict(loss="bipo")),
    "reps": ("dpo", dict(loss="reps")),
    "lorra": (
        "dpo",
        dict(
            loss="lorra", peft_config=SteeringVectorConfig(layers=1, site="mlp", positions="completion"),
            views={name: get_view("instruction", text=text) for name, text in (("good", "sea"), ("bad", "a dog"))},
        ),
    ),
    "attention": ("dpo", dict(loss="dpo", peft_config=SteeringVectorConfig(layers=2, site="attention"))),
    "mlp on completions": (
        "dpo", dict(loss="dpo", peft_config=SteeringVectorConfig(layers=[1, 2], site="mlp", positions="completion")),
    ),
    "mlp on prompts": (
        "dpo", dict(loss="dpo", peft_config=SteeringVectorConfig(layers=[1, 2], site="mlp", positions="prompt")),
    ),
    "completions": ("dpo", dict(loss="dpo", peft_config=SteeringVectorConfig(layers=1, positions="completion"))),
    "completions of sft": (
        "sft", dict(loss="cross_entropy", peft_config=SteeringVectorConfig(layers=1, positions="completion")),
    ),
    "lora with dropout": (
        "dpo",
        dict(loss="dpo", disable_dropout=False, peft_config=LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[2, 3], lora_dropout=0.3)),
    ),
    "every second layer": (
        "dpo", dict(loss="dpo", gradient_checkpointing_kwargs={"use_reentrant": False, "every_n_layers": 2}),
    ),
    "nothing below": (
        "dpo", dict(loss="dpo", peft_config=SteeringVectorConfig(layers=0, site="mlp", positions="prompt")),
    ),
}  # fmt: skip


@pytest.mark.thinned(2)
@pytest.mark.parametrize("prefix", [None, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_training_is_equal_to_training_without_both(name, prefix, tmp_path):
    """With TRL's default `gradient_checkpointing=True`, and without the prefix too."""
    kind, options = OPTIONS[name]
    if name in ("bipo", "reps") and "__call__" in vars(GradientCheckpointingLayer):
        pytest.skip("refused before transformers 5.23, which checkpoints hooks too")
    options = {"data": demonstrations() if kind == "sft" else pairs(), "max_steps": 4, **options}
    plain_options = {k: v for k, v in options.items() if k != "gradient_checkpointing_kwargs"}
    plain = trained(kind, tmp_path / "plain", gradient_checkpointing=False, frozen_prefix=False, **plain_options)
    ours = trained(kind, tmp_path / "ours", gradient_checkpointing=True, frozen_prefix=prefix, **options)
    assert_equal(ours, plain)


@pytest.mark.parametrize("site", ["block", "mlp"])
def test_reentrant_checkpointing_takes_the_plain_path_and_is_right(site, tmp_path, caplog):
    options = dict(loss="dpo", peft_config=SteeringVectorConfig(layers=1, site=site, positions="completion"))
    plain = trained("dpo", tmp_path / "plain", frozen_prefix=False, **options)
    reentrant = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert_equal(trained("dpo", tmp_path / "ours", **reentrant, **options), plain)
    warnings = [record.getMessage() for record in of_the_prefix(caplog) if record.levelno >= logging.WARNING]
    [warning] = [text for text in warnings if "reentrant gradient checkpointing" in text]
    assert "'use_reentrant': False" in warning


def test_the_strength_of_the_forward_pass_counts():
    """The backward pass comes when the strength has been changed."""
    gradients = []
    for model in (steered(layers=1, site="mlp"), checkpointed(steered(layers=1, site="mlp"))):
        with FrozenPrefix().shortcut(model, training=True).on(), set_strength(model, 2.0):
            outputs = ModelAt(model, model, pair_batch())(1)
        with set_strength(model, -3.0):
            outputs.token_logps.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_a_stack_that_checkpoints_in_its_own_way_is_off():
    """As remote code may: its blocks carry no flag."""
    stack = torch.nn.Module()
    stack.gradient_checkpointing = True
    assert "in its own way" in str(checkpointing.not_recomputable(stack, [torch.nn.Linear(2, 2)]))
    assert checkpointing.not_recomputable(stack.eval(), [torch.nn.Linear(2, 2)]) is None


def test_upstream_still_keeps_its_function_where_we_read_it():
    """`_gradient_checkpointing_func`, a partial with the user's options, on every block."""
    model = AutoModelForCausalLM.from_config(tiny().config).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    stack = Decoder(model, 1)
    assert all(checkpointing._function_of(block).keywords == {"use_reentrant": False} for block in stack.blocks)
    assert stack.not_recomputable() is None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert "reentrant" in str(stack.not_recomputable())


@pytest.mark.parametrize("whose", ["transformers", "peft"])
def test_upstream_still_calls_its_hook_on_embeddings_by_the_name_we_know(whose):
    model = steered(layers=2)
    if whose == "transformers":
        model.enable_input_require_grads()
    else:
        prepare_model_for_kbit_training(model.get_base_model(), use_gradient_checkpointing=True)
        model.base_model.model.model.layers[2].steer.requires_grad_(True)
    prefix = FrozenPrefix()
    with_gradients(model, pair_batch(), prefix.shortcut(model, training=True))
    assert len(prefix.memo)
