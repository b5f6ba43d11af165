"""What a vector file says about itself, and what is refused where it does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_data import saved_on_its_base
from tiny_models import steered, tiny

from steertune.adapters import description, exports
from steertune.adapters.description import Strength, TrainingData, check_constant, read_description, write_description
from steertune.adapters.exports import gguf
from steertune.recipes import cli

FORMS = [
    {}, {"form": "gated"}, {"form": "low_rank", "rank": 2}, {"norm": "preserve"}, {"layers": [0, 2], "tied": True},
    {"norm": "capped", "norm_value": 2.0, "positions": "completion", "site": "mlp"},
]  # fmt: skip


def changed(formula: str, h, v, w, b) -> torch.Tensor:
    """What a formula adds to states, `(rows, tokens, d)`, at strength 1."""
    if formula == "h + s v":
        return v.expand_as(h)
    if formula == "h + s relu(w.h + b) v":
        return (h @ w + b).relu()[..., None] * v
    assert formula == "h + s V^T (W h + b)"
    return (h @ w.T + b) @ v


@pytest.mark.parametrize("switches", FORMS, ids=str)
def test_a_description_says_how_to_load_the_vector_without_this_library(switches, tmp_path):
    """Following it, and nothing else, gives the steered output of every module it names."""
    model = steered(tiny(), **{"layers": [1, 2], **switches})
    model.save_pretrained(tmp_path)
    write_description(tmp_path, Strength(2.0), TrainingData("0" * 64, 3))
    values = read_description(tmp_path)
    assert values is not None and all(key in values for key in description.REQUIRED)
    assert values["strength"]["recommended"] == 2.0 and values["data"]["examples"] == 3
    weights = load_file(tmp_path / values["weights"]["file"])
    for name in values["modules"]:
        keys = values["tensors"][next(iter(values["tensors"])) if values["tied"] else name]
        v, w, b = (weights[keys[kind]] if kind in keys else None for kind in "vwb")
        h = torch.randn(1, 4, values["width"])
        change = changed(values["formula"].split(",")[0], h, v, w, b)
        if values["norm"]["rule"] == "capped":
            change = change * (values["norm"]["value"] / change.norm(dim=-1, keepdim=True)).clamp(max=1)
        steered_h = h + change
        if "rescaled" in values["formula"]:
            steered_h = steered_h * h.norm(dim=-1, keepdim=True) / steered_h.norm(dim=-1, keepdim=True)
        layer = model.get_base_model().get_submodule(name).steer
        before, layer.boundary._prompts = layer.boundary._prompts, None
        config = layer.config["default"]
        positions, config.positions = config.positions, "all"
        assert torch.allclose(layer(h), steered_h, atol=1e-5)
        config.positions, layer.boundary._prompts = positions, before
        assert values["positions"] == positions


def test_a_description_of_other_weights_is_not_believed(tmp_path):
    steered(layers=1, seed=1).save_pretrained(tmp_path)
    write_description(tmp_path)
    assert read_description(tmp_path) is not None
    steered(layers=1, seed=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="describes other weights"):
        read_description(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "expected a JSON object"),
        ("{", "not the description"),
        ('{"format": "steering-vector/2"}', "only 'steering-vector/1' is"),
        ('{"format": "steering-vector/1", "operation": "add"}', "lacks formula, hook"),
    ],
)
def test_a_description_that_is_none(text, says, tmp_path):
    (tmp_path / description.FILE).write_text(text)
    with pytest.raises(ValueError, match=says):
        read_description(tmp_path)


def test_exports_carry_it_and_imports_heed_it(tmp_path):
    """A control vector of another base model of the same width, or of another operation, is refused."""
    model = steered(tiny(), layers=[1, 2])
    vectors = exports.constant_vectors(model)
    for target, file in (("gguf", gguf.FILE), ("safetensors", "vectors.safetensors")):
        folder = tmp_path / target
        folder.mkdir()
        exports.get(target).write(vectors, model, folder)
        values = gguf.read_facts(folder / file) if target == "gguf" else description.embedded_in(folder / file)
        assert values == json.loads(json.dumps(vectors.description))
        check_constant(values, tiny(), file)
        with pytest.raises(ValueError, match="not the adapter's base model"):
            check_constant(values, tiny(seed=5), file)
        for key, value in (("operation", "project"), ("site", "mlp"), ("positions", "completion")):
            with pytest.raises(ValueError, match=f"{key} is '{value}'"):
                check_constant({**values, key: value}, tiny(), file)


def test_the_command_refuses_a_control_vector_of_another_model(tmp_path, capsys):
    model = steered(tiny(), layers=[1, 2])
    folder = tmp_path / "gguf"
    folder.mkdir()
    exports.get("gguf").write(exports.constant_vectors(model), model, folder)
    saved_on_its_base(tmp_path / "home", seed=7)
    words = ["export", str(folder / gguf.FILE), "--from", "gguf", "--output", str(tmp_path / "made")]
    assert cli.main([*words, "--model", str(tmp_path / "home" / "base")]) == 2
    assert "not the adapter's base model" in capsys.readouterr().err
