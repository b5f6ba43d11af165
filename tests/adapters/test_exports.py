"""Exports: loaded by other tools in a fresh process, refused where they cannot be exact, and read back."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import tiny_data
import torch
from gguf_files import gguf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, steered, tiny, tokens

from steertune.adapters import SteeringVectorConfig, exports, set_strength
from steertune.adapters.exports import ExportError, adapter_of, constant_vectors, export
from steertune.adapters.exports import _verify as verification
from steertune.adapters.exports._base import ADD
from steertune.adapters.exports._places import linear_places
from steertune.adapters.exports.gguf import read as read_gguf
from steertune.adapters.exports.repeng import read as read_repeng
from steertune.adapters.exports.steering_vectors import read as read_steering_vectors
from steertune.recipes import export as recipe

INPUTS = [[3, 9, 27, 5], [7, 11, 13]]
# the last map of these blocks is not what the block adds: a norm stands behind it, or experts are fused
POST_NORM = {"gemma2", "gemma3_text"}
FUSED = {"mixtral", "qwen3_moe"}
CONV = {"gpt2"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A folder with the tiny llama."""
    folder = tmp_path_factory.mktemp("base")
    tiny().save_pretrained(folder)
    return str(folder)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


@pytest.mark.parametrize(
    "target",
    ["safetensors", "gguf", *(pytest.param(name, marks=pytest.mark.slow) for name in ("peft", "lm_eval", "vllm"))],
)
def test_a_fresh_process_finds_the_same(target, base, tmp_path):
    model = steered(layers=2)
    made = export(model, target, tmp_path / "out", base, INPUTS, strength=-1.5)
    assert made.error < 1e-4 < 0.1 < made.effect
    page = (tmp_path / "out" / "README.md").read_text()
    assert made.lines.replace(str(tmp_path / "out"), "out").strip() in page and "strength -1.5" in page
    # what the README says, here: the lines do not import steertune, so this process may run them
    names: dict = {}
    exec(made.lines, names)
    with set_strength(model, -1.5):
        assert torch.allclose(logits(names["model"]), logits(model), atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_merged_weights_carry_the_vector_through_reload(tmp_path, base, verified_here):
    made = export(steered(layers=[1, 2]), "merged", tmp_path / "out", base, INPUTS)
    assert made.error < 1e-4 < made.effect
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mlp_bias"] is True
    biases = {k: v for k, v in load_file(tmp_path / "out" / "model.safetensors").items() if k.endswith("bias")}
    assert {k for k, v in biases.items() if v.any()} == {f"model.layers.{i}.mlp.down_proj.bias" for i in (1, 2)}


@pytest.mark.parametrize("target", ["peft", "merged"])
def test_where_a_block_has_room_is_measured(architecture, target):
    """Against what is known of every architecture, and against the steered model itself."""
    model = steered(tiny(architecture), layers=[1, 2])
    writer, vectors = exports.get(target), constant_vectors(model)
    no_bias = {"qwen2", "qwen3", "mistral"} | POST_NORM | FUSED  # and no switch for one
    refused = POST_NORM | FUSED | (CONV if target == "peft" else no_bias)
    if architecture in refused:
        with pytest.raises(ExportError, match="What works"):
            writer.check(vectors, model)
        return
    places = linear_places(vectors, model, lambda m: hasattr(m, "weight") and m.weight.ndim == 2)
    writer.check(vectors, model)
    expected = logits(model)
    with model.disable_adapter():
        hooks = [
            model.get_base_model().get_submodule(place).register_forward_hook(lambda m, a, out, v=vector: out + v)
            for place, vector in places.values()
        ]
        assert torch.allclose(logits(model), expected, atol=1e-5)
    for hook in hooks:
        hook.remove()


def test_every_architecture_is_known_to_the_test_above():
    assert set(ARCHITECTURES) > POST_NORM | FUSED | CONV


def test_scaled_residuals_are_divided_out():
    granite = tiny("granite", residual_multiplier=0.5, seed=3)
    model = steered(granite, layers=2)
    [(place, vector)] = linear_places(
        constant_vectors(model), model, lambda m: isinstance(m, torch.nn.Linear)
    ).values()
    assert place == "model.layers.2.mlp.down_proj"
    assert torch.allclose(vector, 2 * constant_vectors(model).by_layer[2], rtol=1e-3)
    expected = logits(model)
    granite = model.get_base_model()
    granite.get_submodule(place).register_forward_hook(lambda m, args, out: out + vector)
    with model.disable_adapter():
        assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("switches", "scale"),
    [
        ({"norm": "capped", "norm_value": 2.0}, 2.0),
        ({"norm": "fixed", "norm_value": 3.0, "init": "random"}, 3.0),
        ({"norm": "relative", "norm_value": 0.5, "init": "random", "residual_norms": {"2": 8.0}}, 4.0),
    ],
)
def test_lengths_are_baked_in(switches, scale):
    model = steered(layers=2, **switches)
    assert constant_vectors(model, strength=-2).by_layer[2].norm() == pytest.approx(2 * scale, rel=1e-5)
    vectors = constant_vectors(model, strength=-2).vectors
    with set_strength(model, -2):
        expected = logits(model)
    names: dict = {"vectors": vectors, "model": tiny()}
    exec(ADD + "for n, v in vectors.items(): model.get_submodule(n).register_forward_hook(adding(v))", names)
    assert torch.allclose(logits(names["model"]), expected, atol=1e-5)


def test_tied_layers_and_other_sites(base, tmp_path, verified_here):
    tied = steered(layers=[1, 2], tied=True)
    assert len({tuple(v.tolist()) for v in constant_vectors(tied).vectors.values()}) == 1
    inside = steered(layers=1, site="attention")
    assert export(inside, "peft", tmp_path / "inside", base, INPUTS).error < 1e-4
    [name] = load_file(tmp_path / "inside" / "adapter_model.safetensors")
    assert name == "base_model.model.model.layers.1.self_attn.o_proj.beft_bias"


REFUSED = {
    "a gate": (lambda: steered(layers=2, form="gated"), "safetensors", "form='gated' depends on the state"),
    "low rank": (lambda: steered(layers=2, form="low_rank", rank=2), "peft", "form='low_rank'"),
    "norm": (lambda: steered(layers=2, norm="preserve"), "safetensors", "norm='preserve'"),
    "positions": (lambda: steered(layers=2, positions="completion"), "peft", "positions='completion'"),
    "zero": (lambda: steered(layers=2, seed=0), "safetensors", "is zero or not finite"),
    "layer 0": (lambda: steered(layers=[0, 2]), "gguf", "Layer 0 is not representable"),
    "site": (lambda: steered(layers=2, site="mlp"), "gguf", "site='mlp'"),
    "site for vllm": (lambda: steered(layers=2, site="mlp"), "vllm", "site='mlp'"),
    "a gate for merged": (lambda: steered(layers=2, form="gated"), "merged", "form='gated' depends on the state"),
    "norm for lm_eval": (lambda: steered(layers=2, norm="preserve"), "lm_eval", "norm='preserve'"),
    "positions for vllm": (lambda: steered(layers=2, positions="prompt"), "vllm", "positions='prompt'"),
    "plain model": (lambda: tiny(), "peft", "has no adapter"),
    "lora": (lambda: get_peft_model(tiny(), LoraConfig(target_modules="all-linear")), "peft", "only steering vectors"),
    "a typing error": (lambda: steered(layers=2), "safetensor", "Did you mean 'safetensors'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused(case, base, tmp_path):
    make, target, message = REFUSED[case]
    model, strength = make(), 0.0 if case == "zero" else 1.0
    with pytest.raises(ValueError, match=message):
        export(model, target, tmp_path / "out", base, INPUTS, strength)
    assert not list(tmp_path.iterdir())


def test_beside_another_adapter_it_is_refused():
    model = steered(layers=2)
    model.add_adapter("second", SteeringVectorConfig(layers=1))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ExportError, match="2 adapters are active"):
        constant_vectors(model)
    beside = get_peft_model(tiny(), LoraConfig(target_modules="all-linear")).get_base_model()
    with pytest.raises(ExportError, match="The model also has another adapter"):
        constant_vectors(steered(beside, layers=2))


def test_another_base_is_caught_and_nothing_is_left(tmp_path, verified_here):
    tiny(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(ExportError, match="does not behave the same.*Is base="):
        export(steered(layers=2), "safetensors", tmp_path / "out", str(tmp_path / "other"), INPUTS)
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_a_planted_bug_is_caught(base, tmp_path, monkeypatch, verified_here):
    """Off by one layer."""
    target = exports.get("safetensors")
    monkeypatch.setattr(
        type(target),
        "write",
        lambda self, vectors, model, folder: save_file(
            {name.replace("2", "1"): v for name, v in vectors.vectors.items()}, folder / "vectors.safetensors"
        ),
    )
    with pytest.raises(ExportError, match="does not behave the same"):
        export(steered(layers=2), "safetensors", tmp_path / "out", base, INPUTS)


def test_a_vector_that_cannot_be_told_from_rounding_is_refused(base, tmp_path):
    with pytest.raises(ExportError, match="too close to rounding error"):
        export(steered(layers=2), "safetensors", tmp_path / "out", base, INPUTS, strength=1e-7)
    with pytest.raises(ExportError, match="inputs is empty"):
        export(steered(layers=2), "safetensors", tmp_path / "out", base, [])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ExportError, match="not empty"):
        export(steered(layers=2), "safetensors", tmp_path / "out", base, INPUTS)


def test_the_fresh_process_does_not_import_this_package(tmp_path):
    with pytest.raises(ExportError, match="cannot load the export(.|\n)*the package under test was imported"):
        verification._in_fresh_process("import steertune.adapters\nmodel = None", [])


def test_a_control_vector_is_read_back(tmp_path):
    model = steered(layers=[1, 3])
    exports.get("gguf").write(constant_vectors(model), model, tmp_path)
    vectors = read_gguf(tmp_path / "control-vector.gguf")
    assert {i: v.tolist() for i, v in vectors.items()} == {
        i: v.tolist() for i, v in constant_vectors(model).by_layer.items()
    }
    again = adapter_of(tiny(), vectors)
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    again.save_pretrained(tmp_path / "adapter")
    assert torch.allclose(logits(PeftModel.from_pretrained(tiny(), tmp_path / "adapter")), logits(model), atol=1e-6)


def test_the_vllm_plug_in_reads_what_was_written(tmp_path):
    """hotwire's own reader and request parser, on the CPU. Its kernel, and vLLM around it, need a GPU and are not
    run: what it adds to a row is `scales[slot] * bank[slot]` by its documentation."""
    state = pytest.importorskip("hotwire._state", reason="pip install hotwire-vllm")
    model = steered(layers=[1, 3])
    exports.get("vllm").write(constant_vectors(model, 2.0), model, tmp_path)
    plugin = state.SteerState(4, 32, 16, torch.device("cpu"), torch.float32, n_slots=8)
    plugin.load_store(str(tmp_path / "vectors"))
    spec = state.parse_spec((tmp_path / "request.json").read_text())
    assert [part["layer"] for part in spec] == [1, 3]
    for part in spec:
        slot = plugin.slot_for(part["id"], part["layer"], 0.5 * part["scale"])
        added = plugin.bank.scales[slot] * plugin.bank.bank[slot]
        assert torch.allclose(added, constant_vectors(model).by_layer[part["layer"]])


@pytest.mark.parametrize(
    ("architecture", "tensors", "message"),
    [
        ("llama", {"direction.1": torch.ones(32)}, "holds a 'llama' model"),
        ("controlvector", {"direction.0": torch.ones(32)}, "named direction.N"),
        ("controlvector", {"other": torch.ones(32)}, "named direction.N"),
        ("controlvector", {"direction.1": torch.full((32,), torch.inf)}, "must be a finite fp32 vector"),
        ("controlvector", {"direction.1": torch.ones(32, 2)}, "must be a finite fp32 vector"),
        ("controlvector", {"direction.1": torch.ones(32), "direction.2": torch.ones(16)}, "the same width"),
    ],
)
def test_bad_control_vectors(architecture, tensors, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        read_gguf(gguf(tmp_path / "bad.gguf", architecture, tensors))


def test_files_that_are_none(tmp_path):
    (tmp_path / "noise.gguf").write_bytes(b"GGUF" + bytes(40))
    for file in (tmp_path / "noise.gguf", tmp_path / "nowhere.gguf"):
        with pytest.raises(ExportError, match="not a readable GGUF file"):
            read_gguf(file)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({}, "needs finite vectors"),
        ({1: torch.ones(16)}, r"\(16,\)"),
        ({1: torch.full((32,), torch.nan)}, "finite"),
        ({9: torch.ones(32)}, "layer 9 does not exist"),
    ],
)
def test_bad_vectors_make_no_adapter(vectors, message):
    with pytest.raises(ExportError, match=message):
        adapter_of(tiny(), vectors)


def test_objects_of_other_packages_are_read():
    """By their documented attributes; the packages themselves are tried where they are installed."""
    control = types.SimpleNamespace(model_type="llama", directions={2: torch.ones(32).numpy()})
    vector = types.SimpleNamespace(layer_type="decoder_block", layer_activations={2: torch.ones(32)})
    for vectors in (read_repeng(control), read_steering_vectors(vector)):
        assert torch.equal(vectors[2], torch.ones(32))
        assert torch.equal(constant_vectors(adapter_of(tiny(), vectors)).by_layer[2], torch.ones(32))
    vector.layer_type = "mlp"
    with pytest.raises(ExportError, match="decoder_block"):
        read_steering_vectors(vector)


@pytest.mark.parametrize("target", ["repeng", "steering_vectors"])
def test_other_packages_find_the_same(target, base, tmp_path, verified_here):
    try:
        pytest.importorskip(target)
    except AttributeError as error:  # repeng 0.4 asks NumPy for what its version 2 has no more
        pytest.skip(f"{target} does not import here: {error}")
    assert export(steered(layers=[1, 2]), target, tmp_path / "out", base, INPUTS).error < 1e-4


def test_the_object_of_steering_vectors_is_read():
    package = pytest.importorskip("steering_vectors", reason="pip install --no-deps steering-vectors")
    vectors = constant_vectors(steered(layers=[1, 3])).by_layer
    again = adapter_of(tiny(), read_steering_vectors(package.SteeringVector(vectors, layer_type="decoder_block")))
    assert torch.allclose(logits(again), logits(steered(layers=[1, 3])), atol=1e-6)


@pytest.mark.parametrize("target", ["repeng", "steering_vectors"])
def test_a_missing_package_is_named(target, base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, target, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match="pip install"):
        export(steered(layers=2), target, tmp_path / "out", base, INPUTS)


def adapter_folder(tmp_path: Path, base: str) -> Path:
    """A saved adapter of the tiny llama, and a tokenizer beside the base."""
    tiny_data.tokenizer().save_pretrained(base)
    model = steered(tiny(), layers=2)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_recipe_exports_a_folder_and_reads_a_control_vector(base, tmp_path, capsys, verified_here):
    folder = adapter_folder(tmp_path, base)
    (tmp_path / "prompts.txt").write_text("the cat runs\n\na dog sits\n")
    words = [str(folder), "--to", "gguf", "--output", str(tmp_path / "out"), "--json"]
    assert recipe.main([*words, "--prompts", str(tmp_path / "prompts.txt"), "--strength", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["largest difference of a logit"] < 1e-4 < found["largest effect on a logit"]
    file = str(tmp_path / "out" / "control-vector.gguf")
    assert recipe.main([file, "--from", "gguf", "--model", base, "--output", str(tmp_path / "back")]) == 0
    again = PeftModel.from_pretrained(tiny(), tmp_path / "back")
    own = PeftModel.from_pretrained(tiny(), folder)
    with set_strength(own, 2):
        assert torch.allclose(logits(again), logits(own), atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--to", "peft", "--output", "out"], "is not an adapter folder"),
        (["x.gguf", "--from", "gguf", "--output", "out"], "--from needs --model"),
        (["x.gguf", "--from", "gguf", "--model", "m", "--output", "."], "exists already"),
        (["x.gguf", "--from", "gguf", "--model", "m", "--output", "out"], "no such file or folder"),
    ],
)
def test_the_recipe_refuses(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert recipe.main(words) == 2
    assert message in capsys.readouterr().err
