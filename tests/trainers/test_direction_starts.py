"""Inductive biases that start at a direction: LoRA and the whole model begin as activation addition."""

from __future__ import annotations

import pytest
import torch
from one_step import lora, steps
from peft import AdaLoraConfig
from tiny_data import trained, trainer
from tiny_models import tiny

from steertune.adapters import SteeringVectorConfig, directions
from steertune.adapters.observing import base_model
from steertune.trainers import BiasError, get_bias
from steertune.trainers.initial_vectors import pair_batches

# -- direction_start --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, -2.0])
def test_lora_that_starts_as_activation_addition_is_activation_addition(scale, tmp_path):
    biases = {"direction_start": {"layer": 2, "scale": scale}}
    made = trainer("dpo", tmp_path, loss="dpo", peft_config=lora(lora_bias=True), inductive_biases=biases, max_steps=1)
    vector = trainer(
        "dpo",
        tmp_path,
        loss="dpo",
        peft_config=SteeringVectorConfig(layers=2, init="mean_difference", init_scale=scale),
    )
    vector.initialise_vectors()
    made.initialise_vectors()
    batch = {k: v for k, v in pair_batches(made)[0].items() if k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours, theirs = (m.model.eval()(**batch).logits for m in (made, vector))
        with made.model.disable_adapter():
            base = made.model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-4, rtol=1e-4)
    assert (ours - base).abs().max() > 1e-3


def test_a_trained_bias_of_the_model_itself_can_start_too(tmp_path):
    model = tiny(mlp_bias=True)
    biases = {"direction_start": {"layer": 1}}
    made = trainer("dpo", tmp_path, model=model, loss="dpo", peft_config=None, inductive_biases=biases, max_steps=1,
                   ref_model=tiny(mlp_bias=True))  # fmt: skip
    reference = directions.compute("mean_difference", tiny(mlp_bias=True), pair_batches(made), [1]).vectors[1]
    made._unstarted_biases[0].start(made)
    torch.testing.assert_close(made.model.model.layers[1].mlp.down_proj.bias, reference)


def test_what_carries_no_constant_is_refused(tmp_path):
    for config in (lora(), lora(lora_bias=True, target_modules=["q_proj"]), None):
        own = {"ref_model": tiny()} if config is None else {}
        made = trainer("dpo", tmp_path, loss="dpo", peft_config=config, inductive_biases=["direction_start"], **own)
        with pytest.raises(BiasError, match=r"nothing trained at .*mlp.down_proj can hold a constant.*lora_bias=True"):
            made.train()


def test_a_norm_behind_the_mlp_is_noticed_and_nothing_is_left_behind(tmp_path):
    model = tiny("gemma2")
    made = trainer(
        "dpo",
        tmp_path,
        model=model,
        loss="dpo",
        peft_config=lora(lora_bias=True),
        inductive_biases=["direction_start"],
    )
    with pytest.raises(BiasError, match="another module follows it"):
        made.train()
    found = {name: p for name, p in made.model.named_parameters() if "lora_B" in name and name.endswith("bias")}
    assert found and all(float(p.abs().max()) < 1e-6 for p in found.values())


def test_lora_without_a_bias_starts_near_activation_addition(tmp_path):
    """The reference knows only the inputs: minimum ridge by numpy's least squares on the stacked system."""
    biases = {"rank_one_start": {"layer": 2, "scale": 1.5}}
    made = trainer("dpo", tmp_path, loss="dpo", peft_config=lora(r=3), inductive_biases=biases, max_steps=1)
    model, batches = made.model, pair_batches(made)
    vector = 1.5 * directions.compute("mean_difference", model, batches, [2]).vectors[2]
    module = base_model(model).model.layers[2].mlp.down_proj
    before = module.lora_A.default.weight.detach().clone()
    made._unstarted_biases[0].start(made)
    a, b = module.lora_A.default.weight, module.lora_B.default.weight
    assert torch.equal(a[1:], before[1:]) and not b[:, 1:].any()
    torch.testing.assert_close(b[:, 0], vector / module.scaling["default"])
    answers = torch.cat([batch["completion_mask"].bool().flatten() for batch in batches])
    seen, outputs = [], []
    handles = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1))),
               module.register_forward_hook(lambda _, args, out: outputs.append(out.flatten(0, 1)))]  # fmt: skip
    for batch in batches:
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        with torch.no_grad(), model.disable_adapter():
            model(**inputs)
        with torch.no_grad():
            model(**inputs)
    for handle in handles:
        handle.remove()
    x = torch.cat(seen[::2])[answers].double()
    ridge = 1e-3 * x.square().sum(dim=1).median()
    system = torch.cat([x, ridge.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
    target = torch.cat([torch.ones(len(x)), torch.zeros(x.shape[1])]).double()
    torch.testing.assert_close(a[0].double(), torch.linalg.lstsq(system, target).solution, rtol=1e-3, atol=1e-3)
    moved = (torch.cat(outputs[1::2]) - torch.cat(outputs[::2]))[answers]
    gains = moved @ vector / vector.square().sum()
    assert abs(gains.mean() - 1) < 0.2 and gains.std() < 0.5, "near activation addition"


def test_only_a_new_lora_starts_so(tmp_path):
    ada = AdaLoraConfig(target_modules=["down_proj"], init_r=2, target_r=1, total_step=10, tinit=1, tfinal=1)
    for config in (lora(target_modules=["q_proj"]), ada):
        made = trainer("dpo", tmp_path, loss="dpo", peft_config=config, inductive_biases=["rank_one_start"])
        with pytest.raises(
            BiasError, match=r"neither a LoRA of two matrices nor the map itself is trained at .*mlp.down_proj"
        ):
            made.train()
    made = trained("dpo", tmp_path, loss="dpo", peft_config=lora(), inductive_biases=["rank_one_start"], max_steps=1)
    made._unstarted_biases = [get_bias("rank_one_start")]
    with pytest.raises(BiasError, match="is already trained"):
        made.train()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_full_finetuning_starts_near_activation_addition_too(model_type, tmp_path):
    biases = {"rank_one_start": {"layer": 2, "scale": 1.5}}
    options = dict(
        model=tiny(model_type), loss="dpo", peft_config=None, ref_model=tiny(model_type), inductive_biases=biases
    )
    made = trainer("dpo", tmp_path, **options)
    batches = pair_batches(made)
    vector = 1.5 * directions.compute("mean_difference", made.model, batches, [2]).vectors[2]
    before, plain = {n: p.detach().clone() for n, p in made.model.named_parameters()}, handed_on(made.model, batches)
    made._unstarted_biases[0].start(made)
    changed = [n for n, p in made.model.named_parameters() if not torch.equal(p, before[n])]
    [name] = changed
    assert name.split(".layers.")[-1] == "2.mlp.down_proj.weight" or name.endswith("h.2.mlp.c_proj.weight")
    change = made.model.get_parameter(name) - before[name]
    singular = torch.linalg.svdvals(change.detach())
    assert singular[1] < 1e-5 * singular[0], "one direction"
    moved = handed_on(made.model, batches) - plain
    gains = moved @ vector / vector.square().sum()
    assert abs(gains.mean() - 1) < 0.2 and gains.std() < 0.5
    torch.testing.assert_close(moved, gains[:, None] * vector, rtol=1e-3, atol=1e-4)
    reference = dict(made.ref_model.named_parameters())
    assert torch.equal(reference[name], before[name])
    made.train()


def handed_on(model, batches) -> torch.Tensor:
    """What block 2 hands on at the answers' tokens, `(tokens, d)`."""
    found = []
    for batch in batches:
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        with torch.no_grad():
            hidden = model(**inputs, output_hidden_states=True).hidden_states[3]
        found.append(hidden[batch["completion_mask"].bool()])
    return torch.cat(found)


@pytest.mark.parametrize(("model_type", "options"), [("gemma2", {}), ("llama", {"use_dora": True})])
def test_a_rank_one_start_that_does_not_come_out_is_taken_back(model_type, options, tmp_path):
    config = lora(target_modules=["down_proj"], **options)
    made = trainer(
        "dpo", tmp_path, model=tiny(model_type), loss="dpo", peft_config=config, inductive_biases=["rank_one_start"]
    )
    before = steps(made)
    with pytest.raises(BiasError, match="another module follows it, or scales it"):
        made.train()
    assert all(torch.equal(value, before[name]) for name, value in steps(made).items())


@pytest.mark.parametrize("layer", [-1, 1.5, "middle"])
@pytest.mark.parametrize("name", ["direction_start", "rank_one_start"])
def test_layers_of_a_start_are_checked(name, layer):
    with pytest.raises((ValueError, TypeError), match="layer=|not supported"):
        get_bias(name, layer=layer)


def test_data_without_pairs_have_no_direction(tmp_path):
    config = lora(lora_bias=True)
    made = trainer("sft", tmp_path, loss="cross_entropy", peft_config=config, inductive_biases=["direction_start"])
    with pytest.raises(BiasError, match="the training data have none"):
        made.train()
