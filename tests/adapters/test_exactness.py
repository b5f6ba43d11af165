"""A steering vector is addition, exactly: on every architecture, at every site, at every strength."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tiny_models import ARCHITECTURES, steered, tiny, tokens, vector_of

from steertune.adapters import SteeringVectorConfig, set_strength

LAYER = 1

# The names of the modules, written down by hand to check the library's own search for them.
BLOCKS = {"gpt2": "transformer.h", "gptj": "transformer.h", "falcon": "transformer.h", "bloom": "transformer.h",
          "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}  # fmt: skip
ATTENTIONS = {"gpt2": "attn", "gptj": "attn", "falcon": "self_attention", "bloom": "self_attention",
              "gpt_neox": "attention"}  # fmt: skip
RETURNS_A_TUPLE = {"gptj", "falcon", "bloom"}


def module_at(model, architecture: str, site: str = "block") -> torch.nn.Module:
    name = f"{BLOCKS.get(architecture, 'model.layers')}.{LAYER}"
    if site == "attention":
        name += "." + ATTENTIONS.get(architecture, "self_attn")
    return model.get_submodule(name + ".mlp" if site == "mlp" else name)


def add_by_hand(module: torch.nn.Module, vector: torch.Tensor) -> None:
    def hook(module, args, output):
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    module.register_forward_hook(hook)


def captured(model, ids: torch.Tensor) -> torch.Tensor:
    """The residual stream after block LAYER."""
    return model(input_ids=ids, output_hidden_states=True).hidden_states[LAYER + 1]


@torch.no_grad()
def test_untrained_model_is_the_base_bit_for_bit(architecture):
    ids = tokens()
    base = tiny(architecture)(input_ids=ids).logits
    model = get_peft_model(tiny(architecture), SteeringVectorConfig(layers=LAYER)).eval()
    assert torch.equal(model(input_ids=ids).logits, base)


@torch.no_grad()
def test_the_vector_is_what_adding_by_hand_gives(architecture):
    ids = tokens()
    model = steered(tiny(architecture), layers=LAYER)
    by_hand = tiny(architecture)
    add_by_hand(module_at(by_hand, architecture), vector_of(model))
    assert torch.equal(model(input_ids=ids).logits, by_hand(input_ids=ids).logits)
    assert not torch.equal(model(input_ids=ids).logits, tiny(architecture)(input_ids=ids).logits)


@torch.no_grad()
def test_captured_states_move_by_the_vector_and_no_other_layer_does(architecture):
    ids = tokens()
    before = tiny(architecture)(input_ids=ids, output_hidden_states=True).hidden_states
    model = steered(tiny(architecture), layers=LAYER)
    after = model(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(
        after[LAYER + 1] - before[LAYER + 1], vector_of(model).expand_as(after[0]), rtol=0, atol=2e-6
    )
    assert torch.equal(after[LAYER], before[LAYER])


@torch.no_grad()
def test_capture_is_steered_also_when_the_base_was_captured_before():
    """transformers leaves its capture hooks on the blocks; ours must come first."""
    base = tiny()
    before = captured(base, tokens())
    model = steered(base, layers=LAYER)
    assert torch.equal(captured(model, tokens()), before + vector_of(model))


@torch.no_grad()
def test_a_batch_of_two_is_two_batches_of_one(architecture):
    """Blocks that return a tensor tempt hooks into `output[0]`, which is the first row."""
    ids = tokens()
    model = steered(tiny(architecture), layers=LAYER)
    alone = torch.cat([model(input_ids=row[None]).logits for row in ids])
    torch.testing.assert_close(model(input_ids=ids).logits, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_disabled_and_strength_zero_are_the_base_bit_for_bit(architecture):
    ids = tokens()
    base = tiny(architecture)(input_ids=ids).logits
    model = steered(tiny(architecture), layers=LAYER)
    with_vector = model(input_ids=ids).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, base)
    with set_strength(model, 0):
        assert torch.equal(model(input_ids=ids).logits, base)
    assert torch.equal(model(input_ids=ids).logits, with_vector)


@torch.no_grad()
@pytest.mark.parametrize("strength", [-1.0, 0.5, 2.0])
def test_strength_is_linear_where_the_vector_is_added(architecture, strength):
    ids = tokens()
    before = captured(tiny(architecture), ids)
    model = steered(tiny(architecture), layers=LAYER)
    with set_strength(model, strength):
        assert torch.equal(captured(model, ids), before + strength * vector_of(model))


@torch.no_grad()
@pytest.mark.parametrize("site", ["attention", "mlp"])
def test_attention_and_mlp_outputs(architecture, site):
    if (architecture, site) == ("opt", "mlp"):
        pytest.skip("OPT has no MLP module: see the next test")
    ids = tokens()
    model = steered(tiny(architecture), layers=LAYER, site=site)
    by_hand = tiny(architecture)
    add_by_hand(module_at(by_hand, architecture, site), vector_of(model))
    assert torch.equal(model(input_ids=ids).logits, by_hand(input_ids=ids).logits)
    assert not torch.equal(model(input_ids=ids).logits, tiny(architecture)(input_ids=ids).logits)


def test_a_missing_mlp_is_said():
    with pytest.raises(ValueError, match=r"Cannot identify the mlp module of model\.decoder\.layers\.1.*target_mod"):
        get_peft_model(tiny("opt"), SteeringVectorConfig(layers=LAYER, site="mlp"))


@torch.no_grad()
def test_target_modules_is_the_way_out():
    """OPT again: the last linear of its MLP, named by hand."""
    model = steered(tiny("opt"), target_modules=r"model\.decoder\.layers\.1\.fc2")
    by_hand = tiny("opt")
    add_by_hand(by_hand.get_submodule("model.decoder.layers.1.fc2"), vector_of(model))
    ids = tokens()
    assert torch.equal(model(input_ids=ids).logits, by_hand(input_ids=ids).logits)


@torch.no_grad()
def test_the_architectures_cover_blocks_that_return_tensors_and_tuples():
    kinds = {}
    for architecture in ARCHITECTURES:
        model = tiny(architecture)
        module_at(model, architecture).register_forward_hook(
            lambda module, args, output, name=architecture: kinds.update({name: isinstance(output, tuple)})
        )
        model(input_ids=tokens())
    tuples = {name for name, is_tuple in kinds.items() if is_tuple}
    assert {"bloom", "falcon"} <= tuples <= RETURNS_A_TUPLE  # GPT-J returns a tensor since transformers 5.24


@torch.no_grad()
def test_half_precision_bases_get_the_rounded_fp32_sum():
    ids = tokens()
    base = tiny().to(torch.bfloat16)
    before = captured(base, ids)
    model = steered(base, layers=LAYER)
    assert torch.equal(captured(model, ids), (before.float() + vector_of(model)).to(torch.bfloat16))
