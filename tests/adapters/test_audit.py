"""Constant vectors in the weights of a checkpoint are found where they are, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_data import tokenizer
from tiny_models import steered, tiny
from transformers import AutoModelForCausalLM

from steertune.adapters import exports
from steertune.adapters.analysis.audit import audit, without
from steertune.recipes import cli


def baked(model_type: str, folder: Path, **switches):
    """A checkpoint with a vector in its weights, its base model, and the vectors by layer."""
    base = tiny(model_type)
    model = steered(tiny(model_type), **switches)
    vectors = exports.constant_vectors(model, 1.5)
    exports.get("merged").write(vectors, model, folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), base, vectors.by_layer


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("layers", [[1], [0, 2]])
def test_a_merged_vector_is_found_and_taken_out(model_type, with_base, layers, tmp_path):
    model, base, vectors = baked(model_type, tmp_path, layers=layers)
    found = audit(model, base if with_base else None)
    assert [one.layer for one in found.constants] == layers and not found.changed
    for one in found.constants:
        assert one.certain and one.site == "block"
        assert torch.allclose(one.vector, vectors[one.layer], atol=1e-4)
    ids = torch.arange(3, 11)[None]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, base(input_ids=ids).logits, atol=1e-3)
        without(model, found.constants)
        assert torch.allclose(model(input_ids=ids).logits, base(input_ids=ids).logits, atol=1e-5)
    assert sum(not torch.equal(before[name], p) for name, p in model.named_parameters()) == len(layers)


def test_at_attention_it_is_a_constant_of_attention(tmp_path):
    model, base, vectors = baked("gpt2", tmp_path, layers=[2], site="attention")
    for found in (audit(model), audit(model, base)):
        [one] = found.constants
        assert (one.layer, one.site, one.parameter) == (2, "attention", "transformer.h.2.attn.c_proj.bias")
        assert torch.allclose(one.vector, vectors[2], atol=1e-4)


def test_biases_that_act_on_states_are_no_constants():
    """Of queries and of norms before a map; and a model's own biases, as long in every block."""
    model, base = tiny("gpt2"), tiny("gpt2")
    with torch.no_grad():
        block = model.transformer.h[1]
        block.attn.c_attn.bias[:32] += torch.randn(32)  # of the queries
        block.ln_2.bias += torch.randn(32)
        for other in (model, base):
            for i, each in enumerate(other.transformer.h):
                each.mlp.c_proj.bias += torch.randn(32, generator=torch.Generator().manual_seed(i))
    assert audit(model).constants == [] and audit(base).constants == []
    found = audit(model, base)
    assert found.constants == []
    assert set(found.changed) == {"transformer.h.1.attn.c_attn.bias", "transformer.h.1.ln_2.bias"}


def test_one_bias_far_longer_than_its_like_is_suspicious_and_not_certain():
    model = tiny("gpt2", num_hidden_layers=8)
    with torch.no_grad():
        for i, block in enumerate(model.transformer.h):
            block.mlp.c_proj.bias += torch.randn(32, generator=torch.Generator().manual_seed(i))
        added = 10 * torch.randn(32, generator=torch.Generator().manual_seed(99))
        model.transformer.h[5].mlp.c_proj.bias += added
    [one] = audit(model).constants
    assert (one.layer, one.certain) == (5, False)
    assert torch.cosine_similarity(one.vector, added, dim=0) > 0.9


def test_changed_matrices_are_named_beside_a_base():
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).merge_and_unload()
    found = audit(model, tiny())
    assert found.constants == [] and {name.rpartition(".q_proj")[2] for name in found.changed} == {".weight"}
    assert audit(model) == audit(tiny())
    with pytest.raises(ValueError, match="other blocks than the checkpoint"):
        audit(model, tiny(num_hidden_layers=2))


def test_the_command_says_which_vector_and_undoes_it(tmp_path, capsys):
    tiny().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    model = steered(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), layers=[1])
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "mine")
    exports.get("merged").write(exports.constant_vectors(model, -2.0), model, tmp_path / "merged")
    tokenizer().save_pretrained(tmp_path / "merged")
    words = [
        "audit",
        str(tmp_path / "merged"),
        "--vectors",
        str(tmp_path / "mine"),
        "--output",
        str(tmp_path / "clean"),
    ]
    assert cli.main([*words, "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    [one] = values["constants"]
    assert one["parameter"] == "model.layers.1.mlp.down_proj.bias"
    assert one["matches"][0]["cosine"] == pytest.approx(-1) and one["matches"][0]["strength"] == pytest.approx(-2)
    assert (
        values["output"]["largest difference of both together"] < 1e-4 < values["output"]["largest change of a logit"]
    )
    assert cli.main(["audit", str(tmp_path / "clean" / "model"), "--base", str(tmp_path / "base")]) == 0
    assert "No constant vector" in capsys.readouterr().out
    clean = AutoModelForCausalLM.from_pretrained(tmp_path / "clean" / "model")
    from peft import PeftModel

    again = PeftModel.from_pretrained(clean, str(tmp_path / "clean" / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "cannot be loaded"),
        (["embedded", "--vectors", "nowhere"], "is not an adapter folder"),
        (["embedded", "--output", "."], "exists already"),
    ],
)
def test_the_command_refuses(words, says, capsys):
    assert cli.main(["audit", *words]) == 2
    assert says in capsys.readouterr().err
