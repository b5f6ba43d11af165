"""Bad values and bad files are errors, and each error says which value and what to do."""

from __future__ import annotations

import math
import os

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import steered, tiny, tokens, vector_of
from transformers import AutoModelForCausalLM, BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from steertune.adapters import SteeringVectorConfig, directions, set_strength

# -- the configuration ----------------------------------------------------------------------------------------------

BAD_SWITCHES = [
    ({"form": "bais"}, r"form='bais' is not one of \['bias', .*Did you mean 'bias'\?"),
    ({"form": "Gated"}, "form='Gated'.*Did you mean 'gated'"),
    ({"site": "blok"}, "site='blok'.*Did you mean 'block'"),
    ({"norm": "fix"}, "norm='fix'.*Did you mean 'fixed'"),
    ({"positions": "completions"}, "positions='completions'.*Did you mean 'completion'"),
    ({"positions": None}, "positions=None is not one of .*'all'"),
    ({"init": "men_difference"}, "init='men_difference' is not 'zeros', 'random'.*Did you mean 'mean_difference'"),
    ({"init": "zero"}, "init='zero'.*Did you mean 'zeros'"),
    ({"layers": -1}, r"layers=-1: -1 is out of range. Indices are whole numbers from 0"),
    ({"layers": 1.5}, r"layers=1.5: 1.5 is out of range.*fractions of the depth are in \[0, 1\)"),
    ({"layers": 1.0}, "layers=1.0"),
    ({"layers": math.nan}, "layers=nan"),
    ({"layers": [0, -2]}, r"layers=\[0, -2\]: -2 is out of range"),
    ({"layers": []}, r"layers=\[\] steers nothing. Give an index"),
    ({"layers": None}, "layers=None"),
    ({"layers": True}, "layers=True: True is neither an index, a fraction nor 'all'"),
    ({"layers": "al"}, "layers='al': .* is neither an index, a fraction nor 'all'"),
    ({"layers": ["all"]}, r"layers=\['all'\]"),
    ({"norm": "fixed", "init": "random"}, "norm='fixed' needs a finite norm_value > 0, got None"),
    ({"norm": "capped", "norm_value": 0}, "norm='capped' needs a finite norm_value > 0, got 0"),
    ({"norm": "capped", "norm_value": -1.0}, "got -1.0"),
    ({"norm": "capped", "norm_value": math.nan}, "got nan"),
    ({"norm": "capped", "norm_value": math.inf}, "got inf"),
    ({"norm": "capped", "norm_value": "5"}, "got '5'"),
    ({"norm_value": 2.0}, "norm='free' takes no norm_value, got 2.0. Remove it"),
    ({"norm": "preserve", "norm_value": 2.0}, "norm='preserve' takes no norm_value"),
    ({"norm": "fixed", "norm_value": 1.0}, "norm='fixed' needs a direction to start from.*set init='random'"),
    ({"norm": "relative", "norm_value": 1.0}, "norm='relative' needs a direction to start from"),
    ({"norm": "fixed", "norm_value": 1.0, "init": "random", "init_scale": 0.0}, "init_scale=0.0"),
    ({"norm": "fixed", "norm_value": 1.0, "init": "random", "form": "low_rank"}, "not for form='low_rank'"),
    ({"init_scale": math.nan}, "init_scale=nan is not a finite number"),
    ({"rank": 4}, "rank=4 with form='bias': rank > 1 needs form='low_rank'"),
    ({"form": "low_rank", "rank": 0}, "rank=0 must be a whole number of at least 1"),
    ({"form": "low_rank", "rank": 2.5}, "rank=2.5 must be a whole number of at least 1"),
]


@pytest.mark.parametrize("switches, message", BAD_SWITCHES, ids=[str(switches) for switches, _ in BAD_SWITCHES])
def test_bad_switches(switches, message):
    with pytest.raises(ValueError, match=message):
        SteeringVectorConfig(**switches)


# -- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [4, [0, 7]])
def test_a_layer_the_model_does_not_have(layers):
    with pytest.raises(ValueError, match=r"layer (4|7) does not exist, the model has 4: 0 to 3"):
        get_peft_model(tiny(), SteeringVectorConfig(layers=layers))


def test_models_that_are_no_decoders():
    with pytest.raises(ValueError, match="Linear has no transformers config, so its decoder blocks are unknown"):
        get_peft_model(torch.nn.Linear(3, 3), SteeringVectorConfig())
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=20))
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration is an encoder-decoder.*decoder-only"):
        get_peft_model(t5, SteeringVectorConfig())
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 20,
    }
    with pytest.raises(AttributeError, match=r"BertModel.*prepare_inputs_for_generation"):  # PEFT's own refusal
        get_peft_model(BertModel(BertConfig(**sizes)), SteeringVectorConfig())


def test_target_modules_that_match_nothing_or_no_residual_states():
    with pytest.raises(ValueError, match="Target modules foo not found"):
        get_peft_model(tiny(), SteeringVectorConfig(target_modules="foo"))
    with pytest.raises(
        ValueError, match=r"Linear returned \(2, 8, 64\), not residual states of width 32.*choose other"
    ):
        steered(target_modules="lm_head")(input_ids=tokens())


def test_blocks_that_cannot_be_told():
    model = tiny()
    model.twin = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(4))
    with pytest.raises(
        ValueError, match=r"Cannot identify the 4 decoder blocks.*\['model.layers', 'twin'\].*target_modules"
    ):
        get_peft_model(model, SteeringVectorConfig())


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf])
def test_strengths_that_are_not_finite(strength):
    with pytest.raises(ValueError, match=f"strength={strength} is not a finite number"):
        set_strength(steered(), strength)


@pytest.mark.parametrize("form", ["gated", "linear", "low_rank"])
def test_forms_without_one_direction_have_no_null(form):
    with pytest.raises(ValueError, match=f"one direction of form='bias', got .*{form}"):
        set_strength(steered(form=form), "null")


def test_strength_of_nothing():
    with pytest.raises(ValueError, match=r"No steering vector to scale; the model has \[\]"):
        set_strength(tiny(), 2.0)
    with pytest.raises(ValueError, match=r"No steering vector 'defalt'.*Did you mean 'default'"):
        set_strength(steered(), 2.0, adapter_name="defalt")


@pytest.mark.parametrize("init", directions.names())
def test_an_init_from_data_without_data(init):
    model = get_peft_model(tiny(), SteeringVectorConfig(init=init))
    with pytest.raises(
        ValueError, match=rf"init='{init}' needs data: use a steertune trainer, or directions\.compute"
    ):
        model(input_ids=tokens())


def test_values_that_break_after_loading():
    model = steered()
    state_dict = {n: torch.full_like(p, math.nan) for n, p in model.state_dict().items() if "steering_vector" in n}
    with pytest.raises(ValueError, match=r"steering_vector_v\.default\.weight holds 32 NaN or infinite values of 32"):
        model.load_state_dict(state_dict, strict=False)
    assert torch.isfinite(vector_of(model)).all()


# -- the folder -----------------------------------------------------------------------------------------------------

KEY = "base_model.model.model.layers.2.steer.steering_vector_v.weight"


@pytest.fixture
def folder(tmp_path):
    """A good adapter folder."""
    steered().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


BAD_FILES = {
    "nan": (lambda t: {KEY: t[KEY] * math.nan}, f"{KEY} holds 32 NaN or infinite values of 32"),
    "inf": (lambda t: {KEY: torch.cat([t[KEY][1:], torch.tensor([math.inf])])}, "holds 1 NaN or infinite values"),
    "width": (lambda t: {KEY: t[KEY][:16].clone()}, r"has shape \(16,\), but the config asks for \(32,\)"),
    "rank": (lambda t: {KEY: t[KEY].repeat(2, 1)}, r"has shape \(2, 32\), but the config asks for \(32,\)"),
    "missing": (lambda t: {"other.weight": t[KEY]}, r"vectors for 0 layers, but the config names 1: \[2\]"),
    "other layer": (lambda t: {KEY.replace("2", "1"): t[KEY]}, r"layers\.1\.steer.*does not belong to an adapter on"),
    "extra layer": (lambda t: {**t, KEY.replace("2", "3"): t[KEY] + 1}, r"layers\.3\.steer.*does not belong"),
    "extra gate": (
        lambda t: {**t, KEY.replace("vector_v", "vector_w"): t[KEY] + 1},
        r"holds \['v', 'w'\], but form='bias' needs",
    ),
    "unknown": (
        lambda t: {**t, KEY.replace("vector_v", "vector_u"): t[KEY] + 1},
        "steering_vector_u.weight' does not belong",
    ),
}


@pytest.mark.parametrize("change, message", BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.parametrize("is_trainable", [False, True])
def test_bad_files(folder, change, message, is_trainable):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny(), folder, is_trainable=is_trainable)
    with pytest.raises(ValueError, match=message):
        steered().load_adapter(folder, "second", is_trainable=is_trainable)


@pytest.mark.parametrize("name", ["nan", "width", "missing", "other layer"])
def test_bad_files_by_the_way_of_transformers(folder, name):
    """`load_adapter` of transformers does not ask us about the folder: at the latest the first forward stops."""
    rewrite(folder, BAD_FILES[name][0])
    model = tiny()
    with pytest.raises((ValueError, RuntimeError)):
        model.load_adapter(str(folder))
        model(input_ids=tokens())


def test_a_truncated_file(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is not a readable safetensors file"):
        PeftModel.from_pretrained(tiny(), folder)


class Trap:
    """Unpickling it leaves a folder behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("route", ["peft", "transformers"])
def test_a_pickle_is_never_read(folder, tmp_path, route):
    (folder / "adapter_model.safetensors").unlink()
    sprung = tmp_path / "sprung"
    torch.save({KEY: Trap(sprung)}, folder / "adapter_model.bin")
    if route == "peft":
        with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle.*Save it as adapter_model.safetensors"):
            PeftModel.from_pretrained(tiny(), folder)
    else:
        with pytest.raises(OSError, match=r"adapter_model.safetensors"):
            tiny().load_adapter(str(folder))
    assert not sprung.exists()


# -- the wrong base model -------------------------------------------------------------------------------------------

OTHER_BASES = {
    "seed": (lambda: tiny(seed=1), "its embeddings differ by"),
    "width": (lambda: tiny(hidden_size=64), "hidden_size is 64, the adapter was made for 32"),
    "depth": (lambda: tiny(num_hidden_layers=6), "num_layers is 6, the adapter was made for 4"),
    "type": (lambda: tiny("qwen2"), "model_type is 'qwen2', the adapter was made for 'llama'"),
}


@pytest.mark.parametrize("base, message", OTHER_BASES.values(), ids=OTHER_BASES)
def test_another_base_is_refused(folder, base, message):
    match = f"not the adapter's base model: {message}.*Load the right base, or.*base_fingerprint=None"
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(base(), folder)
    with pytest.raises(ValueError, match=match):
        base().load_adapter(str(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_half_precision_is_accepted(folder, dtype):
    model = PeftModel.from_pretrained(tiny().to(dtype), folder)
    assert torch.equal(vector_of(model), vector_of(steered()))


@pytest.mark.parametrize("base", [lambda: tiny(seed=1), lambda: tiny("gpt2")], ids=["seed", "architecture"])
def test_transfer_on_purpose(folder, base):
    config = SteeringVectorConfig.from_pretrained(str(folder))
    config.base_fingerprint = config.target_modules = None
    model = get_peft_model(base(), config)
    vector_of(model).data.copy_(vector_of(steered()))
    expected = steered(base(), layers=2)
    assert torch.equal(model(input_ids=tokens()).logits, expected(input_ids=tokens()).logits)


def test_transfer_of_a_folder(folder):
    config = SteeringVectorConfig.from_pretrained(str(folder))
    config.base_fingerprint = None
    model = PeftModel.from_pretrained(tiny(seed=1), folder, config=config)
    expected = steered(tiny(seed=1), layers=2)
    assert torch.equal(model(input_ids=tokens()).logits, expected(input_ids=tokens()).logits)


def test_the_right_base_from_disk(folder, tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(base, folder)
