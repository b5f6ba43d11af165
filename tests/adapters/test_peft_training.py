"""Training through PEFT: checkpointing, compilation, quantised and 16-bit bases."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging import version
from peft import (
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from tiny_models import logits, steered, tiny, tokens, vector_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from steertune.adapters import SteeringVectorConfig, set_strength, steering_layers


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("site", ["block", "attention", "mlp"])
@pytest.mark.parametrize("switches", [{}, {"form": "gated", "positions": "completion"}], ids=str)
def test_gradient_checkpointing_changes_no_gradient(switches, site, reentrant):
    """From the very first forward on."""
    ids = tokens()
    labels = ids.clone()
    labels[:, :3] = -100
    found = []
    for checkpointing in (False, True):
        model = steered(layers=[0, 2], site=site, **switches).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=ids, labels=labels).loss.backward()
        found.append(gradients(model))
    assert len(found[0]) == 2 * len(model.peft_config["default"].parameter_names)
    torch.testing.assert_close(found[1], found[0])


HOOKS_STAY_OUTSIDE = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="older transformers run a block's hooks again in the backward pass",
)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "site, ends",
    [("block", "after"), ("mlp", "after"), pytest.param("block", "before", marks=HOOKS_STAY_OUTSIDE)],
)
def test_gradient_checkpointing_at_another_strength(site, ends, reentrant):
    """Inside a block the strength must last until backward is done (see `set_strength`), at the block it need not."""
    ids, found = tokens(), []
    for checkpointing in (False, True):
        model = steered(layers=1, site=site, norm="preserve").train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with set_strength(model, -2.0):
            loss = model(input_ids=ids, labels=ids).loss
            if ends == "after":
                loss.backward()
        if ends == "before":
            loss.backward()
        found.append(gradients(model))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize(
    "backend, switches",
    [("eager", {}), ("aot_eager", {"form": "gated", "norm": "preserve"}), ("aot_eager", {"positions": "completion"})],
)
def test_compiled_is_the_same(switches, backend):
    torch.compiler.reset()
    ids = tokens()
    model = steered(tiny(num_hidden_layers=1), layers=0, **switches)
    expected = model(input_ids=ids, labels=ids)
    expected.loss.backward()
    gradient = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, backend=backend)
    found = compiled(input_ids=ids, labels=ids)
    found.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(gradients(model), gradient)
    if switches:
        return  # each further setting compiles again, for seconds
    with set_strength(model, -1.0):
        torch.testing.assert_close(logits(compiled, labels=ids), logits(model, labels=ids))
    with model.disable_adapter():
        torch.testing.assert_close(logits(compiled, labels=ids), logits(tiny(num_hidden_layers=1)))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}

    def base():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=BitsAndBytesConfig(**kind), device_map="cpu"
        )

    before = logits(base())
    model = get_peft_model(prepare_model_for_kbit_training(base()), SteeringVectorConfig(layers=1))
    torch.testing.assert_close(logits(model.eval()), before, rtol=1e-4, atol=1e-5)
    assert vector_of(model).dtype == torch.float32
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        loss = model.train()(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(prepare_model_for_kbit_training(base()), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model.eval()))


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_a_bf16_base_does_not_freeze_the_vector(autocast_adapter_dtype):
    """A bf16 number near 2 cannot take steps of 0.001: it would stay 2 for ever."""
    base, config = tiny().to(torch.bfloat16), SteeringVectorConfig(init="random", stream_sizes={})
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)
    vector = vector_of(model)
    assert vector.dtype == torch.float32
    vector.data.fill_(2.0)
    optimizer = torch.optim.AdamW([vector], lr=1e-3, weight_decay=0.0)
    for _ in range(100):
        optimizer.zero_grad()
        logits_ = model(input_ids=tokens(1, 4)).logits
        (0.0 * logits_.sum() + vector.sum()).backward()
        optimizer.step()
    assert vector.mean().item() == pytest.approx(1.9, abs=1e-3)


def test_a_model_cast_to_bf16_still_runs():
    for form in ("bias", "gated", "low_rank"):
        assert torch.isfinite(logits(steered(form=form, norm="preserve").to(torch.bfloat16))).all()


@torch.no_grad()
def test_a_new_parameter_object_is_the_one_that_counts():
    """FSDP2 puts Parameter objects of its own in place of ours."""
    model = steered()
    before = logits(model)
    holder = steering_layers(model)[0].steering_vector_v["default"]
    holder.weight = torch.nn.Parameter(torch.zeros_like(holder.weight))
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(logits(model), base) and not torch.equal(before, base)
