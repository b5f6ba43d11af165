"""`form="project"` takes a direction out of every state: exactly, in every pass, and nothing else."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_data import losses, trained
from tiny_models import steered, tiny, tokens, vector_of

from steertune.adapters import SteeringVectorConfig, set_strength
from steertune.adapters.analysis.arithmetic import VectorError, read
from steertune.adapters.description import read_description, write_description
from steertune.adapters.exports import ExportError, export

LAYER = 1


def states(model, ids: torch.Tensor, layer: int = LAYER) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1]


def unit(model) -> torch.Tensor:
    v = vector_of(model).detach()
    return v / v.norm()


@pytest.mark.parametrize("strength", [1.0, 0.5, 2.0, 0.0, -1.0])
def test_a_share_of_the_direction_is_gone_and_nothing_else(strength):
    model, ids = steered(form="project", layers=LAYER, init="random"), tokens()
    u = unit(model)
    before = states(tiny(), ids)
    with set_strength(model, strength):
        after = states(model, ids)
    torch.testing.assert_close(after @ u, (1 - strength) * (before @ u), atol=1e-4, rtol=1e-4)
    across_before, across_after = (h - (h @ u)[..., None] * u for h in (before, after))
    torch.testing.assert_close(across_after, across_before, atol=1e-4, rtol=1e-4)


def test_its_length_means_nothing():
    model, ids = steered(form="project", layers=LAYER, init="random"), tokens()
    before = states(model, ids)
    vector_of(model).data *= -37
    torch.testing.assert_close(states(model, ids), before, atol=1e-5, rtol=1e-5)


def test_one_direction_can_be_taken_out_at_every_layer():
    model, ids = steered(form="project", layers="all", tied=True, init="random"), tokens()
    for layer in range(3):  # the last state is normalised
        assert (states(model, ids, layer) @ unit(model)).abs().max() < 1e-4


def test_it_is_exact_while_generating():
    model, ids = steered(form="project", layers="all", tied=True, init="random"), tokens(1, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 63, "pad_token_id": 0}
    whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    with torch.no_grad():
        expected = model(input_ids=whole).logits.argmax(dim=-1)[:, 4:-1]
    assert torch.equal(whole[:, 5:], expected)


def test_a_saved_one_is_the_same_and_cannot_be_exported_as_a_vector(tmp_path):
    model, ids = steered(form="project", layers=LAYER, init="random"), tokens()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny(), str(tmp_path / "adapter"))
    torch.testing.assert_close(states(loaded, ids), states(model, ids))
    assert loaded.peft_config["default"].parameter_names == ("v",)
    write_description(tmp_path / "adapter")
    description = read_description(tmp_path / "adapter")
    assert (description["operation"], description["formula"]) == ("project", "h - s (h.u) u, u = v / |v|")
    with pytest.raises(VectorError, match="form='project'"):
        read(tmp_path / "adapter")
    for target in ("gguf", "merged", "peft", "safetensors"):
        with pytest.raises(ExportError, match="form='project' depends on the state"):
            export(model, target, tmp_path / target, "nowhere", ids.tolist())
    with pytest.raises(ValueError, match="null"):
        set_strength(model, "null")


def test_it_can_be_trained(tmp_path):
    model = get_peft_model(tiny(), SteeringVectorConfig(form="project", layers=LAYER, init="random"))
    before = unit(model)
    size = model.peft_config["default"].stream_sizes[str(LAYER)]
    assert float(vector_of(model).detach().norm()) == pytest.approx(size, rel=1e-5)
    made = trained("dpo", tmp_path, model=model, max_steps=8)
    assert losses(made)[-1] < losses(made)[0] and float(unit(model) @ before) < 0.999


def test_what_it_refuses():
    with pytest.raises(ValueError, match="norm='fixed' needs a length"):
        SteeringVectorConfig(form="project", norm="fixed", norm_value=1.0, init="random")
    with pytest.raises(ValueError, match="form='project' needs a direction to start from"):
        SteeringVectorConfig(form="project")
