"""The base model is bit for bit the base, whatever is loaded onto it, and a vector for another base is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_models import quantised_tiny, steered, tiny, tokens
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from steertune.adapters import SteeringVectorConfig, set_strength
from steertune.adapters.fingerprint import difference, fingerprint

WEIGHTS = "adapter_model.safetensors"
EXTRA = {
    "lm_head.weight": (64, 32),
    "model.embed_tokens.weight": (64, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 48),
    "model.norm.weight": (32,),
}


@pytest.fixture
def folder(tmp_path):
    """A saved adapter."""
    steered(layers=[1, 2]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def with_extra(folder: Path, key: str, prefix: str = "base_model.model.") -> Path:
    """The adapter with a tensor of the base beside its vectors."""
    file = folder / WEIGHTS
    save_file({**load_file(file), prefix + key: torch.ones(EXTRA[key])}, file)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"checksum": None}))
    return folder


def same_base(model: torch.nn.Module) -> bool:
    """Whether every tensor of the bare model is there, bit for bit."""
    found = {
        name.removeprefix("base_model.model.").replace(".original_module", ""): tensor
        for name, tensor in model.state_dict().items()
    }
    return all(torch.equal(found[name], tensor) for name, tensor in tiny().state_dict().items())


# -- extra weights --------------------------------------------------------------------------------------------------

ROUTES = {
    "PeftModel.from_pretrained": lambda base, folder: PeftModel.from_pretrained(base, folder),
    "from_pretrained with a config": lambda base, folder: PeftModel.from_pretrained(
        base, folder, config=SteeringVectorConfig(layers=[1, 2], inference_mode=True)
    ),
    "PeftModel.load_adapter": lambda base, folder: steered(base).load_adapter(folder, "second"),
    "transformers' load_adapter": lambda base, folder: base.load_adapter(str(folder)),
    "transformers' adapter_state_dict": lambda base, folder: base.load_adapter(
        peft_config=SteeringVectorConfig(layers=[1, 2]), adapter_state_dict=load_file(folder / WEIGHTS)
    ),
    "set_peft_model_state_dict": lambda base, folder: set_peft_model_state_dict(
        get_peft_model(base, SteeringVectorConfig(layers=[1, 2])), load_file(folder / WEIGHTS)
    ),
}


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("key", EXTRA)
@pytest.mark.parametrize("route", ROUTES)
def test_extra_weights_are_refused_by_name(folder, route, key, prefix):
    base = tiny()
    refused = rf"{key}'.* is not a steering vector.*would overwrite the base|{key}'.*remove it"
    with pytest.raises(ValueError, match=refused):
        ROUTES[route](base, with_extra(folder, key, prefix))

    assert same_base(base)


def test_extra_weights_in_the_folder_of_a_model_are_refused(folder, tmp_path):
    """`from_pretrained` of an adapter's folder loads the base, and then the adapter."""
    tiny().save_pretrained(tmp_path / "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": str(tmp_path / "base"), "checksum": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="lm_head.weight' is not a steering vector"):
        AutoModelForCausalLM.from_pretrained(with_extra(folder, "lm_head.weight"))


def test_extra_weights_of_a_hub_repository_are_refused(folder, monkeypatch):
    """What is downloaded is checked before PEFT reads it."""
    asked = []

    def download(repo: str, filename: str, subfolder=None, revision=None, user_agent=None) -> str:
        asked.append((repo, filename, revision))
        return str(folder / filename)

    monkeypatch.setattr("peft.config.hf_hub_download", download)
    monkeypatch.setattr("steertune.adapters.saved.hf_hub_download", download)
    SteeringVectorConfig.from_pretrained("somebody/vector", revision="v1")
    assert ("somebody/vector", WEIGHTS, "v1") in asked
    with_extra(folder, "lm_head.weight")
    with pytest.raises(ValueError, match="lm_head.weight' is not a steering vector"):
        SteeringVectorConfig.from_pretrained("somebody/vector")


def test_declared_modules_are_saved_and_loaded(tmp_path):
    model = steered(modules_to_save=["lm_head"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data += 1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert same_base(loaded)


@pytest.mark.parametrize("save_embedding_layers", ["auto", True])
def test_embeddings_that_peft_adds_are_left_out_with_a_warning(save_embedding_layers, tmp_path):
    """PEFT adds them where the vocabulary is not that of the base on disk. They are the base's."""
    tiny().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70)
    model = steered(base)
    with pytest.warns(UserWarning, match="lm_head.weight.*Save the base model itself.*modules_to_save"):
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=save_embedding_layers)
    assert all("steering_vector_" in key for key in load_file(tmp_path / "adapter" / WEIGHTS))
    loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path / "adapter")
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


# -- bit for bit ----------------------------------------------------------------------------------------------------


def peft(folder: Path) -> PeftModel:
    model = PeftModel.from_pretrained(tiny(), folder)
    model.load_adapter(folder, "second")
    return model


def native(folder: Path) -> torch.nn.Module:
    model = tiny()
    model.load_adapter(str(folder))
    model.load_adapter(str(folder), "second")
    return model


def deleted(model):
    model.delete_adapter("second")
    model.delete_adapter("default")
    return model


def switched(model):
    model.set_adapter("second")
    model(tokens())
    return model


def disabled(model):
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, tiny()(tokens()).logits)
    return model


def scaled(model):
    with set_strength(model, 0.0):
        assert torch.equal(model(tokens()).logits, tiny()(tokens()).logits)
    return model


def unloaded(model):
    bare = model.unload()
    assert torch.equal(bare(tokens()).logits, tiny()(tokens()).logits)
    return bare


def disabled_by_transformers(model):
    model.disable_adapters()
    assert torch.equal(model(tokens()).logits, tiny()(tokens()).logits)
    model.enable_adapters()
    return model


WAYS = {
    "peft: load": (peft, lambda model: model),
    "peft: forward": (peft, lambda model: (model(tokens()), model)[1]),
    "peft: generate": (peft, lambda model: (model.generate(input_ids=tokens(), max_new_tokens=2), model)[1]),
    "peft: set_adapter": (peft, switched),
    "peft: disable_adapter": (peft, disabled),
    "peft: strength 0": (peft, scaled),
    "peft: unload": (peft, unloaded),
    "peft: delete_adapter": (peft, deleted),
    "transformers: load": (native, lambda model: model),
    "transformers: forward": (native, lambda model: (model(tokens()), model)[1]),
    "transformers: set_adapter": (native, switched),
    "transformers: disable_adapters": (native, disabled_by_transformers),
    "transformers: strength 0": (native, scaled),
    "transformers: delete_adapter": (native, deleted),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_base_is_bit_for_bit_the_base(folder, way):
    make, use = WAYS[way]
    assert same_base(use(make(folder)))


def test_deleted_adapters_steer_nothing(folder):
    for bare in (deleted(peft(folder)).base_model.model, deleted(native(folder))):
        assert torch.equal(bare(tokens()).logits, tiny()(tokens()).logits)


# -- the fingerprint ------------------------------------------------------------------------------------------------


def merged(base: torch.nn.Module, size: float = 0.02, **switches) -> torch.nn.Module:
    """The base with a LoRA merged into it."""
    model = get_peft_model(base, LoraConfig(r=2, **switches))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=size)
    return model.merge_and_unload()


@pytest.mark.parametrize("target", ["q_proj", "v_proj", "o_proj", "down_proj", "gate_proj", "lm_head", "all-linear"])
@pytest.mark.parametrize("size", [0.02, 0.001])
def test_a_merged_lora_is_another_base(folder, target, size):
    base = merged(tiny(), size, target_modules=target if target == "all-linear" else [target])
    with pytest.raises(ValueError, match=r"not the adapter's base model: its weights .* differ by"):
        PeftModel.from_pretrained(base, folder)
    with pytest.raises(ValueError, match=r"not the adapter's base model"):
        merged(tiny(), size, target_modules=[target] if target != "all-linear" else target).load_adapter(str(folder))


def test_one_merged_layer_is_another_base(folder):
    base = merged(tiny(), 0.005, target_modules=["v_proj"], layers_to_transform=[3])
    with pytest.raises(ValueError, match=r"model.layers.\*.self_attn.v_proj.weight differ"):
        PeftModel.from_pretrained(base, folder)


def test_the_other_way_round(tmp_path):
    steered(merged(tiny(), target_modules=["v_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"v_proj.weight differ"):
        PeftModel.from_pretrained(tiny(), tmp_path)


def test_a_merged_lora_in_half_precision_is_another_base(folder):
    base = merged(tiny().to(torch.bfloat16), 0.05, target_modules=["v_proj"])
    with pytest.raises(ValueError, match=r"v_proj.weight differ"):
        PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.input_layernorm.weight"])
def test_changed_norms_are_another_base(folder, name):
    base = tiny()
    base.get_parameter(name).data *= 1.01
    with pytest.raises(ValueError, match="differ by"):
        PeftModel.from_pretrained(base, folder)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_moe", "bloom"])
@pytest.mark.parametrize("made", DTYPES)
@pytest.mark.parametrize("loaded", DTYPES)
def test_another_precision_is_the_same_base(model_type, made, loaded):
    expected = fingerprint(tiny(model_type).to(made))
    assert difference(expected, fingerprint(tiny(model_type).to(loaded))) is None
    assert difference(expected, fingerprint(tiny(model_type).to(loaded).float())) is None
    assert difference(expected, fingerprint(tiny(model_type, seed=1).to(loaded))) is not None


@pytest.mark.parametrize("kind", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_a_quantised_copy_is_the_same_base(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    base = tiny(**sizes)
    base.save_pretrained(tmp_path / "base")
    copied = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**kind), device_map="cpu"
    )
    before = copied(tokens()).logits
    exact, quantised = fingerprint(base), fingerprint(copied)
    assert torch.equal(copied(tokens()).logits, before)
    assert any("v_proj" in name for name in quantised["weights"]["quantised"])
    assert difference(exact, quantised) is None and difference(quantised, exact) is None
    other = merged(tiny(**sizes), 0.5, target_modules=["v_proj"])
    assert difference(quantised, fingerprint(other)) is not None


def test_adapters_on_the_model_are_no_part_of_the_base():
    expected = fingerprint(tiny())
    model = get_peft_model(tiny(), LoraConfig(target_modules=["v_proj"], modules_to_save=["lm_head"]))
    assert fingerprint(model.get_base_model())["weights"] == expected["weights"]
    assert fingerprint(steered(layers="all").get_base_model())["weights"] == expected["weights"]


def test_a_resized_vocabulary_is_the_same_base(tmp_path):
    steered(tiny(vocab_size=300)).save_pretrained(tmp_path)
    base = tiny(vocab_size=300)
    base.resize_token_embeddings(310)
    PeftModel.from_pretrained(base, tmp_path)


def test_weights_that_cannot_be_read_are_left_out():
    model = tiny()
    expected = fingerprint(model)
    model.model.layers[1].to("meta")
    found = fingerprint(model)
    assert "?" in found["weights"]["values"]["model.layers.*.self_attn.v_proj.weight"]
    assert difference(expected, found) is None and difference(found, expected) is None


def test_fingerprints_of_earlier_versions_still_load(folder):
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["base_fingerprint"]["weights"]
    file.write_text(json.dumps(config | {"checksum": None}))
    loaded = PeftModel.from_pretrained(tiny(), folder)
    assert loaded.peft_config["default"].base_fingerprint["weights"]  # what is saved next has them
    with pytest.raises(ValueError, match="its embeddings differ"):
        PeftModel.from_pretrained(tiny(seed=1), folder)


def test_loading_on_a_rounded_base_keeps_the_exact_fingerprint(folder):
    exact = json.loads((folder / "adapter_config.json").read_text())["base_fingerprint"]
    loaded = PeftModel.from_pretrained(tiny().to(torch.bfloat16), folder)
    assert loaded.peft_config["default"].base_fingerprint == exact


@pytest.mark.parametrize(
    "weights",
    [[], {"values": {}}, {"values": {"a": [1.0]}, "quantised": []}, {"values": {"a": "1 x"}, "quantised": []},
     {"values": {"a": "nan"}, "quantised": []}, {"values": {}, "quantised": [1]}],
)  # fmt: skip
def test_a_malformed_sample_of_weights_is_refused(weights):
    given = {"model_type": "llama", "hidden_size": 32, "num_layers": 4, "embedding": [0.1] * 64, "weights": weights}
    with pytest.raises(ValueError, match="base_fingerprint=.* is not a fingerprint"):
        SteeringVectorConfig(base_fingerprint=given)


def test_the_sample_of_a_large_mixture_stays_small():
    text = json.dumps(fingerprint(tiny("qwen3_moe", num_experts=64)))
    assert len(text) < 20_000


def test_a_quantised_base_is_the_base_after_it_has_run(tmp_path):
    """On some CPUs the first inference pass packs 4-bit weights of such widths for its kernels."""
    model = quantised_tiny(4, tmp_path, hidden_size=64, intermediate_size=64)().eval()
    before = fingerprint(model)
    with torch.no_grad():
        model(input_ids=tokens())
    assert difference(before, fingerprint(model)) is None
    # and where this machine does not pack
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.packing_format_for_cpu = True
    sample = fingerprint(model)["weights"]["values"]
    assert any("?" in line for line in sample.values()) and difference(before, fingerprint(model)) is None
