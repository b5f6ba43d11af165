"""Files of other tools become adapters that do what those tools do, or are refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_data
import torch
from peft import BeftConfig, PeftModel, get_peft_model
from tiny_models import steered, tiny, tokens

from steertune.adapters import exports
from steertune.adapters.exports import ExportError, adapter_of, constant_vectors, export
from steertune.recipes import export as recipe

READ = ["gguf", "easysteer", "lm_eval", "safetensors", "vllm", "vllm_lens", "vllm_hook", "peft"]
TOLD = {"merged": "steertune audit", "repeng": "--from gguf", "steering_vectors": "no file format"}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def test_every_target_is_read_back_or_says_why_not():
    assert sorted([*READ, *TOLD]) == exports.names()
    for name, says in TOLD.items():
        with pytest.raises(ExportError, match=says):
            exports.get(name).read(Path("x"), tiny())


@pytest.mark.parametrize("target", READ)
def test_what_was_written_is_read(target, tmp_path):
    """With the same logits, also in a model that is loaded from what the adapter saved."""
    model = steered(layers=[2] if target in ("vllm_hook", "peft") else [1, 3])
    writer = exports.get(target)
    writer.check(constant_vectors(model, -1.5), model)
    writer.write(constant_vectors(model, -1.5), model, tmp_path)
    base = tiny()
    before = logits(base)
    vectors = writer.read(tmp_path, base)
    assert torch.equal(logits(base), before), "the base is left as it is"
    adapter_of(base, vectors).save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny(), tmp_path / "adapter")
    expected = adapter_of(tiny(), constant_vectors(model, -1.5).by_layer)
    assert torch.allclose(logits(again), logits(expected), atol=1e-5)


@pytest.mark.parametrize(
    "target", ["vllm_lens", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vllm_hook", "easysteer"))]
)
def test_a_fresh_process_finds_the_same(target, tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    made = export(steered(layers=2), target, tmp_path / "out", str(tmp_path / "base"), [[3, 9, 27, 5]], strength=-1.5)
    assert made.error < 1e-4 < 0.1 < made.effect
    assert "Unverified in" in (tmp_path / "out" / "README.md").read_text()


def test_a_former_request_of_easysteer_is_read(tmp_path):
    model, writer = steered(layers=[1, 3]), exports.get("easysteer")
    writer.write(constant_vectors(model), model, tmp_path)
    (tmp_path / "steering.json").unlink()
    request = {"steer_vector_local_path": "control-vector.gguf", "scale": 2.0, "target_layers": [3]}
    every = {"prefill_trigger_tokens": [-1], "generate_trigger_tokens": [-1]}
    request |= {"algorithm": "direct", "normalize": False, **every}
    (tmp_path / "request.json").write_text(json.dumps(request))
    [(layer, vector)] = writer.read(tmp_path, tiny()).items()
    assert layer == 3 and torch.allclose(vector, 2 * constant_vectors(model).by_layer[3])


def test_one_vector_for_all_layers_is_what_vllm_hook_can_say(tmp_path):
    several = steered(layers=[1, 3])
    with pytest.raises(ExportError, match="have different vectors"):
        exports.get("vllm_hook").check(constant_vectors(several), several)
    tied = steered(layers=[1, 3], tied=True)
    writer = exports.get("vllm_hook")
    writer.check(constant_vectors(tied), tied)
    writer.write(constant_vectors(tied), tied, tmp_path)
    assert sorted(writer.read(tmp_path, tiny())) == [1, 3]


def test_a_trained_beft_adapter_becomes_a_vector(tmp_path):
    """Where its map is the last of a pre-norm block; elsewhere what it does depends on the state."""

    def beft(module: str) -> Path:
        model = get_peft_model(tiny(), BeftConfig(target_modules=[module], task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "beft_bias" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        model.save_pretrained(tmp_path / module)
        torch.save(logits(model), tmp_path / module / "logits.pt")
        return tmp_path / module

    folder = beft("model.layers.2.mlp.down_proj")
    again = adapter_of(tiny(), exports.get("peft").read(folder, tiny()))
    assert torch.allclose(logits(again), torch.load(folder / "logits.pt", weights_only=True), atol=1e-5)
    with pytest.raises(ExportError, match="can hold the vector"):
        exports.get("peft").read(beft("model.layers.2.self_attn.o_proj"), tiny())


def lens(**changes: Any) -> dict[str, Any]:
    """A steering vector as vllm-lens writes one."""
    rows = np.ones((1, 32), dtype=np.float32)
    packed = {"data": base64.b64encode(rows.tobytes()).decode(), "dtype": "float32", "shape": [1, 32]}
    return {"activations": packed, "layer_indices": [2], "scale": 2.0, "norm_match": False} | changes


def test_documented_files_of_other_tools(tmp_path):
    """As their own code writes them: hotwire's store, lm-eval's file with a coefficient, a scaled lens vector, and
    halves of 16 bits."""
    torch.save(torch.eye(4, 32), tmp_path / "store.pt")
    store = exports.get("vllm").read(tmp_path / "store.pt", tiny())
    assert sorted(store) == [0, 1, 2, 3] and store[2][2] == 1
    part = {"steering_vector": torch.ones(32).half(), "steering_coefficient": 2, "action": "add", "bias": None}
    torch.save({"layers.1": part}, tmp_path / "steer.pt")
    [vector] = exports.get("lm_eval").read(tmp_path / "steer.pt", tiny()).values()
    assert torch.equal(vector, torch.full((32,), 2.0))
    (tmp_path / "lens.json").write_text(json.dumps(lens()))
    assert torch.equal(exports.get("vllm_lens").read(tmp_path / "lens.json", tiny())[2], torch.full((32,), 2.0))


class Evil:
    """What a pickle could run."""

    def __reduce__(self) -> Any:
        return (print, ("run",))


BAD: dict[str, tuple[str, str, Any, str]] = {
    "a pickle": ("lm_eval", "steer.pt", Evil(), "is not unpickled"),
    "a clamp": ("lm_eval", "steer.pt", {"layers.1": {"action": "clamp"}}, "only 'add'"),
    "a head": ("lm_eval", "steer.pt", {"layers.1": {"action": "add", "head_index": 1}}, "single heads"),
    "no block": (
        "lm_eval",
        "steer.pt",
        {"layers.9": {"action": "add", "steering_vector": torch.ones(32)}},
        "is not a block of",
    ),
    "a number that is none": (
        "lm_eval",
        "steer.pt",
        {"layers.1": {"action": "add", "steering_vector": torch.full((32,), torch.nan)}},
        "finite vector",
    ),
    "a matrix": ("vllm", "store.pt", torch.ones(32), "blocks, d"),
    "rescaling": ("vllm_lens", "lens.json", lens(norm_match=True), "norm_match"),
    "positions": ("vllm_lens", "lens.json", lens(position_indices=[1]), "position_indices"),
    "compression": ("vllm_lens", "lens.json", lens(activations={"compression": "zstd", "dtype": "int16"}), "compress"),
    "a shape that lies": (
        "vllm_lens",
        "lens.json",
        lens(activations={**lens()["activations"], "shape": [9, 32]}),
        "do not have the shape",
    ),
    "the last token": ("vllm_hook", "steer.json", {"method": "add_vector", "positions": "last_token"}, "positions is"),
    "a projection": ("vllm_hook", "steer.json", {"method": "adjust_rs"}, "method is"),
    "another folder": (
        "vllm_hook",
        "steer.json",
        {"method": "add_vector", "vector_path": "../secret.pt"},
        "lies outside",
    ),
    "answers only": (
        "easysteer",
        "steering.json",
        {"vectors": [{"source": "v.gguf", "apply": {"generation": "all"}}]},
        "apply is {'generation': 'all'}",
    ),
    "two vectors": ("easysteer", "steering.json", {"vectors": [{}, {}]}, "must have one vector"),
    "answers only, in the former request": (
        "easysteer",
        "request.json",
        {"algorithm": "direct", "normalize": False},
        "prefill_trigger",
    ),
    "another PEFT method": ("peft", "adapter_config.json", {"peft_type": "LORA"}, "Only BEFT"),
    "no request": ("vllm", "request.json", [{"layer": 1}], "must hold id"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_an_adapter_would_do_otherwise_is_refused(name, tmp_path, capsys):
    target, file, content, says = BAD[name]
    if file.endswith(".pt"):
        torch.save(content, tmp_path / file)
    else:
        (tmp_path / file).write_text(json.dumps(content))
    alone = file in ("store.pt", "lens.json")
    with pytest.raises(ExportError, match=says):
        exports.get(target).read(tmp_path / file if alone else tmp_path, tiny())
    assert "run" not in capsys.readouterr().out


def test_the_recipe_reads_another_tools_file(tmp_path, capsys):
    tiny().save_pretrained(tmp_path / "base")
    tiny_data.tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "lens.json").write_text(json.dumps(lens()))
    options = ["--model", str(tmp_path / "base"), "--strength", "-1"]
    words = [str(tmp_path / "lens.json"), "--from", "vllm_lens", "--output", str(tmp_path / "out"), *options]
    assert recipe.main(words) == 0
    again = PeftModel.from_pretrained(tiny(), tmp_path / "out")
    assert torch.allclose(logits(again), logits(adapter_of(tiny(), {2: torch.full((32,), -2.0)})), atol=1e-5)
    for source, origin, says in (
        ("lens.json", "merged", "steertune audit"),
        ("nowhere", "gguf", "no such file"),
        ("lens.json", "lm_eval", "not unpickled"),
        ("lens.json", "lenses", "must be one of"),
    ):
        assert recipe.main([str(tmp_path / source), "--from", origin, "--output", str(tmp_path / "o"), *options]) == 2
        assert says in capsys.readouterr().err


def test_an_export_of_another_base_is_refused(tmp_path):
    """The description beside the file names the base."""
    for name, seed in (("base", 0), ("other", 5)):
        tiny(seed=seed).save_pretrained(tmp_path / name)
        tiny_data.tokenizer().save_pretrained(tmp_path / name)
    export(steered(layers=2), "safetensors", tmp_path / "out", str(tmp_path / "base"), [[3, 9, 27]])
    words = [str(tmp_path / "out"), "--from", "safetensors", "--output", str(tmp_path / "back"), "--model"]
    assert recipe.main([*words, str(tmp_path / "other")]) == 2 and not (tmp_path / "back").exists()
    assert recipe.main([*words, str(tmp_path / "base")]) == 0
