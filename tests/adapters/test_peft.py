"""What people do with a PEFT method works with this one."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from tiny_models import fill, hooks_on, logits, steered, tiny, tokens, vector_of
from transformers import AutoModelForCausalLM

from steertune.adapters import SteeringVectorConfig, prompt_length, set_strength
from steertune.adapters.blocks import resolve_layers

LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


NEW = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def two_adapters(**switches) -> PeftModel:
    """Adapters `default` at layer 1 and `other` at layers 1 and 2."""
    model = steered(layers=1, **switches)
    model.add_adapter("other", SteeringVectorConfig(layers=[1, 2], **switches))
    fill(model, "other", seed=2)
    return model.eval()


# -- save and load --------------------------------------------------------------------------------------------------


SWITCHES = {
    "bias": {},
    "gated": {"form": "gated"},
    "low_rank": {"form": "low_rank", "rank": 3},
    "several": {"layers": [0, 2]},
    "all": {"layers": "all"},
    "tied": {"layers": [0, 2], "tied": True},
    "mlp": {"site": "mlp"},
    "relative": {
        "norm": "relative", "norm_value": 0.5, "init": "random", "layers": 1, "residual_norms": {"1": 2.0},
    },
    "from_data": {"init": "mean_difference"},
    "by_name": {"target_modules": r"model\.layers\.1\.(mlp|self_attn)", "layers": [0, 1, 2]},
}  # fmt: skip


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("how", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str)
def test_save_and_load(switches, how, tmp_path):
    model = steered(**switches)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path, **how)
    assert torch.equal(logits(loaded.eval()), logits(model))
    trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert all("steering_vector_" in name for name in trainable)
    assert bool(trainable) == how.get("is_trainable", False)


def test_the_folder_holds_d_numbers_and_the_resolved_layers(tmp_path):
    model = steered(layers=0.5)
    model.save_pretrained(tmp_path)
    [tensor] = load_file(tmp_path / "adapter_model.safetensors").values()
    assert (tensor.shape, tensor.dtype) == ((32,), torch.float32)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["layers"] == [2]
    assert config["peft_type"] == "STEERING_VECTOR"
    assert config["base_fingerprint"]["hidden_size"] == 32


@pytest.mark.parametrize("library", [AutoPeftModelForCausalLM, AutoModelForCausalLM], ids=["peft", "transformers"])
def test_auto_classes_load_an_adapter_folder_with_its_base(library, tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    model = steered(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = library.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


def test_a_state_dict_goes_round():
    model, fresh = steered(layers="all", form="gated"), steered(layers="all", form="gated", seed=7)
    result = set_peft_model_state_dict(fresh, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert torch.equal(logits(fresh), logits(model))


# -- the adapters of transformers, without a PeftModel --------------------------------------------------------------


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_transformers_loads_what_peft_saved(switches, tmp_path):
    model = steered(**switches)
    model.save_pretrained(tmp_path)
    inside = tiny()
    inside.load_adapter(str(tmp_path))
    assert torch.equal(logits(inside), logits(model))
    assert not any(p.requires_grad for n, p in inside.named_parameters() if "steering_vector_" in n)


def test_transformers_adapters_from_adding_to_deleting(tmp_path):
    base = logits(tiny())
    model = tiny()
    for i, name in enumerate(("one", "two")):
        model.add_adapter(SteeringVectorConfig(layers=i), adapter_name=name)
        fill(model, name, seed=i)
    model.set_adapter("one")
    one = logits(model)
    model.set_adapter("two")
    two = logits(model)
    assert torch.equal(one, logits(steered(layers=0, seed=0)))
    assert torch.equal(two, logits(steered(layers=1, seed=1)))
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    assert torch.equal(logits(model), two)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path)), two)
    model.delete_adapter("two")
    assert torch.equal(logits(model), one)
    model.delete_adapter("one")
    assert torch.equal(logits(model), base)
    assert not [name for name, _ in model.named_parameters() if "steering_vector_" in name]


def test_transformers_keeps_the_vector_fp32_on_a_bf16_base(tmp_path):
    model = steered(tiny().to(torch.bfloat16))
    model.save_pretrained(tmp_path)
    inside = tiny().to(torch.bfloat16)
    inside.load_adapter(str(tmp_path))
    assert vector_of(inside).dtype == torch.float32
    assert torch.equal(vector_of(inside), vector_of(model))


# -- several adapters -----------------------------------------------------------------------------------------------


def test_switching_and_deleting_adapters():
    base, model = logits(tiny()), two_adapters()
    first = logits(model)
    assert torch.equal(first, logits(steered(layers=1)))
    model.set_adapter("other")
    second = logits(model)
    assert torch.equal(second, logits(steered(layers=[1, 2], seed=2)))
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert [n for n, _ in model.named_parameters() if "steering_vector_" in n and ".other." in n] == []


def test_a_model_whose_trainable_adapter_was_deleted_says_that_nothing_is_left_to_train():
    model = two_adapters()
    with warnings.catch_warnings(action="error"):
        model.train()
    model.delete_adapter("default")  # the other one was never activated, so it is frozen
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.warns(UserWarning, match="No parameter of this model is trainable"):
        model.train()


def test_adding_an_adapter_leaves_the_first_one_training():
    model = two_adapters()
    trains = {name: p.requires_grad for name, p in model.named_parameters() if "steering_vector_" in name}
    assert all(wanted == (".default." in name) for name, wanted in trains.items())
    model.set_adapter("other")
    trains = {name: p.requires_grad for name, p in model.named_parameters() if "steering_vector_" in name}
    assert all(wanted == (".other." in name) for name, wanted in trains.items())


def test_two_active_adapters_add_up():
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        both = model(input_ids=tokens(), output_hidden_states=True).hidden_states[2]
        with model.disable_adapter():
            neither = model(input_ids=tokens(), output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(both - neither, (vector_of(model) + vector_of(model, "other")).expand_as(both))


def test_strength_of_one_adapter_leaves_the_other():
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    with set_strength(model, 0.0, adapter_name="other"):
        assert torch.equal(logits(model), logits(steered(layers=1)))


@pytest.mark.parametrize("name", ["ref", "steer", "my-adapter", "v1"])
def test_names_of_adapters(name, tmp_path):
    model = get_peft_model(tiny(), SteeringVectorConfig(), adapter_name=name)
    fill(model, name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / name, adapter_name=name)
    assert torch.equal(logits(loaded), logits(model.eval()))
    assert not torch.equal(logits(loaded), logits(tiny()))


def test_a_reference_copy_as_trl_makes_it():
    """TRL adds an adapter `ref` and copies the parameters that have `.default.` in their names."""
    model = steered()
    model.add_adapter("ref", SteeringVectorConfig())
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    trained = logits(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), trained)


# -- a batch with several adapters ----------------------------------------------------------------------------------


def rows_apart(model, ids, run) -> torch.Tensor:
    """The rows of `ids`, each run alone: base, default, other, base."""
    out = []
    for row, name in zip(ids, ["__base__", "default", "other", "__base__"], strict=True):
        model.set_adapter("default" if name == "__base__" else name)
        if name == "__base__":
            with model.disable_adapter():
                out.append(run(row[None]))
        else:
            out.append(run(row[None]))
    model.set_adapter("default")
    return torch.cat(out)


NAMES = ["__base__", "default", "other", "__base__"]


@pytest.mark.parametrize("model_type", ["llama", "bloom"])
def test_adapter_names_give_each_row_its_own(model_type):
    model = steered(tiny(model_type), layers=1, form="gated")
    model.add_adapter("other", SteeringVectorConfig(layers=[0, 2]))
    fill(model, "other", seed=2)
    ids = tokens(4)
    torch.testing.assert_close(
        logits(model.eval(), ids, adapter_names=NAMES), rows_apart(model, ids, lambda row: logits(model, row))
    )


@pytest.mark.parametrize("positions", ["completion", "prompt", "last_prompt"])
def test_adapter_names_with_prompts_of_different_lengths(positions):
    model, ids = two_adapters(positions=positions), tokens(4)
    labels = torch.where(torch.arange(8) < torch.tensor([[2], [3], [6], [4]]), -100, ids)
    mixed = logits(model, ids, adapter_names=NAMES, labels=labels)
    rest = iter(labels)
    apart = rows_apart(model, ids, lambda row: logits(model, row, labels=next(rest)[None]))
    torch.testing.assert_close(mixed, apart)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["all", "completion", "last_prompt"])
@pytest.mark.parametrize("beams", [1, 3])
def test_adapter_names_in_generate(beams, positions):
    model, ids = two_adapters(positions=positions), tokens(4, 5)
    mixed = model.generate(input_ids=ids, adapter_names=NAMES, num_beams=beams, **NEW)
    apart = rows_apart(model, ids, lambda row: model.generate(input_ids=row, num_beams=beams, **NEW))
    assert torch.equal(mixed, apart)


@torch.no_grad()
def test_adapter_names_with_several_samples_of_a_row():
    """The row is repeated; so must its name be."""
    model, ids = two_adapters(), tokens(2, 5)
    kwargs = {"max_new_tokens": 1, "do_sample": True, "num_return_sequences": 3, "output_logits": True}
    out = model.generate(input_ids=ids, adapter_names=["__base__", "other"], return_dict_in_generate=True, **kwargs)
    with model.disable_adapter():
        base = logits(model, ids[:1])[:, -1].expand(3, -1)
    model.set_adapter("other")
    other = logits(model, ids[1:])[:, -1].expand(3, -1)
    torch.testing.assert_close(out.logits[0], torch.cat([base, other]))


def test_adapter_names_that_make_no_sense():
    model = two_adapters()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): othr\..*'default', 'other'"):
        logits(model, adapter_names=["default", "othr"])
    with pytest.raises(ValueError, match="but got 1 and 2 respectively"):
        logits(model, adapter_names=["default"])
    model.train()
    with pytest.raises(ValueError, match=r"adapter_names.*eval\(\)"):
        logits(model, adapter_names=["default", "other"])
    model.eval()
    before = hooks_on(model)
    logits(model, adapter_names=["default", "other"])
    assert hooks_on(model) == before


# -- beside other methods -------------------------------------------------------------------------------------------


def test_modules_to_save(tmp_path):
    model = steered(modules_to_save=["lm_head"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data += 0.1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny()))


@pytest.mark.parametrize("order", [["lora", "vector"], ["vector", "lora"]])
@pytest.mark.parametrize("route", ["add_adapter", "inject"])
def test_a_lora_beside_it(order, route):
    """Both work on the same layer, whichever came first."""

    def build(names):
        model = tiny()
        for name in names:
            config = SteeringVectorConfig(layers=1) if name == "vector" else LoraConfig(**LORA)
            if route == "add_adapter":
                model.add_adapter(config, adapter_name=name)
            else:
                inject_adapter_in_model(config, model, name)
                model._hf_peft_config_loaded = True  # what add_adapter would have noted, for set_adapter below
        generator = torch.Generator().manual_seed(4)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        fill(model, "vector")
        return model.eval()

    model = build(order)
    model.set_adapter(["lora", "vector"])
    both = logits(model)
    assert hidden_change(model, 1).abs().max() > 0
    model.set_adapter("vector")
    assert torch.equal(logits(model), logits(steered(layers=1)))
    model.set_adapter("lora")
    only_lora = logits(model)
    assert torch.equal(only_lora, logits(build(["lora"])))
    by_hand = build(["lora"])
    vector = vector_of(model, "vector")
    by_hand.model.layers[1].register_forward_hook(lambda module, args, output: output + vector)
    assert torch.equal(both, logits(by_hand))


def hidden_change(model, layer: int) -> torch.Tensor:
    with torch.no_grad():
        after = model(input_ids=tokens(), output_hidden_states=True).hidden_states[layer + 1]
        model.disable_adapters()
        before = model(input_ids=tokens(), output_hidden_states=True).hidden_states[layer + 1]
        model.enable_adapters()
    return after - before


@pytest.mark.parametrize("switches", [{"layers": [0, 2]}, {"layers": [0, 2], "tied": True}], ids=str)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_injection_by_state_dict(switches, low_cpu_mem_usage):
    model = steered(**switches)
    # as PEFT wants them here: the names of the bare model
    state_dict = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # PEFT's, when config and state dict disagree
        inside = inject_adapter_in_model(
            SteeringVectorConfig(**switches), tiny(), state_dict=state_dict, low_cpu_mem_usage=low_cpu_mem_usage
        )
    set_peft_model_state_dict(inside, state_dict, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(inside), logits(model))


# -- copies, removal, refusals, status ------------------------------------------------------------------------------


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(clone):
    model = steered(layers=[0, 2], tied=True, positions="prompt")
    twin = clone(model)
    with prompt_length(model, 3), prompt_length(twin, 3):
        before = logits(model)
        assert torch.equal(logits(twin), before)
        fill(twin, seed=9)
        assert not torch.equal(logits(twin), before)
        assert torch.equal(logits(model), before)
    assert hooks_on(model) == 3
    assert hooks_on(twin.unload()) == 0
    assert hooks_on(model) == 3


def test_unload_leaves_nothing():
    base = tiny()
    names = [name for name, _ in base.named_modules()]
    model = steered(base, layers="all", positions="prompt")
    assert hooks_on(model) == 5
    bare = model.unload()
    assert bare is base
    assert hooks_on(bare) == 0
    assert [name for name, _ in bare.named_modules()] == names
    assert torch.equal(logits(bare), logits(tiny()))
    assert torch.equal(logits(steered(bare)), logits(steered()))


def test_merging_is_refused_with_the_reason():
    model = steered()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotImplementedError, match=r"no bias.*Keep the adapter"):
            merge()


def test_status():
    model = two_adapters()
    status = get_model_status(model)
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "SteeringVectorModel")
    assert status.available_adapters == ["default", "other"]
    assert status.active_adapters == ["default"]
    assert status.enabled is True and status.merged_adapters == []
    assert (status.trainable_params, status.num_adapter_layers) == (32, 2)
    layers = get_layer_status(model)
    assert [layer.name for layer in layers] == ["model.model.layers.1.steer", "model.model.layers.2.steer"]
    assert layers[0].available_adapters == ["default", "other"]
    assert layers[0].requires_grad == {"default": True, "other": False}
    assert model.get_nb_trainable_parameters()[0] == 32


# -- which layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers, depth, expected",
    [
        (3, 4, [3]),
        (0.0, 4, [0]),
        (0.5, 30, [15]),
        (2 / 3, 30, [20]),
        (0.29, 100, [29]),  # 0.29 * 100 = 28.999999999999996
        (0.999, 4, [3]),
        ([2, 0, 2], 4, [0, 2]),
        ([0.5, 1], 4, [1, 2]),
        ("all", 3, [0, 1, 2]),
    ],
)
def test_layers_are_resolved(layers, depth, expected):
    assert resolve_layers(layers, depth) == expected


def test_every_fraction_of_every_depth_finds_its_layer():
    assert all(resolve_layers(i / depth, depth) == [i] for depth in range(1, 130) for i in range(depth))


def test_many_layers(tmp_path):
    """From 20 on PEFT may shorten lists of targets."""
    base = {"num_hidden_layers": 24}
    model = steered(tiny(**base), layers="all")
    assert len([n for n, _ in model.named_parameters() if "steering_vector_" in n]) == 24
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(**base), tmp_path)), logits(model))
    one = steered(tiny(**base), layers=2)
    [name] = [n for n, _ in one.named_parameters() if "steering_vector_" in n]
    assert ".layers.2.steer." in name  # and not 12, 20, ...
