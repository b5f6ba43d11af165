"""`at(strength)` of a real model: the base at 0, the opposite at -1, one forward per strength."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from tiny_data import losses, same, tokenizer, trained, trainer
from tiny_models import steered, tiny
from torch import nn
from trl.trainer.dpo_trainer import DataCollatorForPreference

from steertune.adapters import set_strength
from steertune.losses import get_loss
from steertune.trainers.batch import Batch
from steertune.trainers.model_at import ModelAt, token_logps
from steertune.trainers.reference import reference_copy

ROWS = [
    {"prompt_ids": [6, 7, 8], "chosen_ids": [9, 10, 2], "rejected_ids": [11, 2]},
    {"prompt_ids": [8, 12], "chosen_ids": [13, 2], "rejected_ids": [14, 15, 16, 2]},
]


def batch() -> Batch:
    return Batch.read(DataCollatorForPreference(pad_token_id=0)(ROWS))


def at(model: nn.Module) -> ModelAt:
    return ModelAt(model, model, batch())


def logps(model: nn.Module) -> torch.Tensor:
    """Token log-probabilities of the batch, from the full logits."""
    given = batch()
    full = model(**given.inputs).logits[:, :-1].float().log_softmax(-1)
    labels = given.labels[:, 1:]
    return full.gather(2, labels.clamp_min(0)[..., None]).squeeze(2).masked_fill(labels == -100, 0)


def negated(model: nn.Module, name: str) -> nn.Module:
    """The model with the parameters of that name times -1."""
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if name in n):
            parameter.neg_()
    return model


def lora() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(tiny(), LoraConfig(r=2, init_lora_weights=False)).eval()


SWITCHES = [
    {},
    {"site": "mlp"},
    {"form": "gated"},
    {"norm": "capped", "norm_value": 1.0},
    {"positions": "completion"},
    {"layers": "all", "tied": True},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_at_0_is_the_base_bit_for_bit(switches):
    model = steered(**switches)
    base, trained = at(tiny())(1), at(model)(1)
    reference = at(model)(0)
    assert torch.equal(reference.token_logps, base.token_logps) and torch.equal(reference.mask, base.mask)
    assert not torch.allclose(trained.token_logps, base.token_logps, atol=1e-3)


def test_at_minus_1_is_the_opposite_vector():
    opposite = at(negated(steered(), "steering_vector_v"))(1)
    assert torch.equal(at(steered())(-1).token_logps, opposite.token_logps)
    assert not torch.allclose(at(steered())(1).token_logps, opposite.token_logps, atol=1e-3)


def test_at_minus_1_is_the_opposite_lora():
    opposite = at(negated(lora(), "lora_B"))(1)
    assert torch.equal(at(lora())(-1).token_logps, opposite.token_logps)
    assert not torch.allclose(at(lora())(1).token_logps, opposite.token_logps, atol=1e-3)


@pytest.mark.parametrize("make", [steered, lora], ids=["vector", "lora"])
def test_strength_is_put_back(make):
    model = make()
    before = at(model)(1).token_logps
    for strength in (0, -1, 3):
        at(model)(strength)
        assert torch.equal(at(model)(1).token_logps, before)


def test_one_forward_per_strength():
    model = steered()
    calls = []
    model.get_base_model().register_forward_hook(lambda *_: calls.append(1))
    ask = at(model)
    for strength in (1, 0, 1.0, -1, 0.0, -1, 1):
        ask(strength)
    assert len(calls) == 3 and set(ask.seen) == {1.0, 0.0, -1.0}


def test_gradient_at_1_and_minus_1_and_none_at_0():
    model = steered()
    [vector] = [p for p in model.parameters() if p.requires_grad]
    ask = at(model)
    assert not ask(0).token_logps.requires_grad
    [plus] = torch.autograd.grad(ask(1).token_logps.sum(), vector)
    [minus] = torch.autograd.grad(ask(-1).token_logps.sum(), vector)
    [expected] = torch.autograd.grad(
        at(opposite := negated(steered(), "steering_vector_v"))(1).token_logps.sum(),
        [p for p in opposite.parameters() if p.requires_grad],
    )
    assert plus.norm() > 0
    torch.testing.assert_close(minus, -expected)


def test_reference_has_no_dropout_in_train_mode_and_modes_are_put_back():
    def with_dropout(model):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        return model.train()

    base = at(tiny("gpt2"))(1).token_logps
    model = with_dropout(steered(tiny("gpt2")))
    model.get_base_model().transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(at(model)(0).token_logps, base)
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert not torch.equal(at(model)(1).token_logps, at(model)(1).token_logps), "the model itself does drop out"


@torch.no_grad()
def test_head_on_labelled_tokens_is_the_full_computation(architecture):
    model = steered(tiny(architecture))
    seen = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output.shape[:2].numel())
    )
    outputs = at(model)(1)
    expected = logps(model)
    labelled = batch().labels[:, 1:] != -100
    columns = labelled.any(0)
    torch.testing.assert_close(outputs.token_logps, expected[:, columns], atol=2e-6, rtol=1e-5)
    assert not expected[:, ~columns].any()
    assert seen == [int(labelled.sum()), batch().labels.numel()] and seen[0] < int(columns.sum()) * len(labelled)


@torch.no_grad()
def test_a_model_that_cannot_skip_columns_gives_the_same():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny()

        def forward(self, input_ids, attention_mask, use_cache):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    outputs = at(Plain())(1)
    torch.testing.assert_close(outputs.token_logps, at(tiny())(1).token_logps)
    assert torch.equal(outputs.logps, outputs.token_logps.sum(1)) and outputs.mask.sum() == 11


@torch.no_grad()
@pytest.mark.parametrize("positions", ["all", "completion", "prompt", "last_prompt"])
def test_left_padding_is_right_padding(positions):
    model = steered(positions=positions)
    right = batch()
    padding = (1 - right.inputs["attention_mask"]).sum(1).tolist()
    assert len(set(padding)) > 1

    def shifted(rows):
        return torch.stack([row.roll(n) for row, n in zip(rows, padding, strict=True)])

    left = Batch({k: shifted(v) for k, v in right.inputs.items()}, shifted(right.labels), pairs=True)
    ours, theirs = (token_logps(model, model, given).logps for given in (left, right))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    base = tiny()
    assert not torch.allclose(theirs, token_logps(base, base, right).logps, atol=1e-2)


@pytest.mark.parametrize("options", [{"loss": "dpo"}, {"loss": get_loss("cross_entropy", change_cap=0.01)}])
def test_full_finetuning_keeps_a_reference_where_the_parent_has_none(options, tmp_path):
    changes = dict(peft_config=None, max_steps=3, learning_rate=1e-2, **options)
    ours = trained("plain", tmp_path, **changes)
    theirs = trained("dpo", tmp_path, ref_model=tiny(), **changes)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    assert same(dict(tiny().named_parameters()), dict(ours.reference.named_parameters()))


def test_sharded_full_finetuning_keeps_no_reference(tmp_path):
    made = trainer("plain", tmp_path, loss="dpo", peft_config=None)
    made.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="would not be sharded"):
        reference_copy(made)


@pytest.mark.parametrize("config", [IA3Config(target_modules=["k_proj"], feedforward_modules=[]), None])
def test_bipo_needs_an_adapter_with_a_strength_and_says_so_before_training(config, tmp_path):
    with pytest.raises(ValueError, match="needs a steering vector or a LoRA to scale"):
        trainer("dpo", tmp_path, loss="bipo", peft_config=config, ref_model=None if config else tiny())


@pytest.mark.parametrize("config", [LoraConfig(target_modules="all-linear"), None])
def test_reps_needs_a_vector_to_take_out_and_says_so_before_training(config, tmp_path):
    with pytest.raises(ValueError, match="steering vector"):
        trainer("dpo", tmp_path, loss="reps", peft_config=config, ref_model=None if config else tiny())


def test_reps_on_a_lora_names_what_it_can_do_instead(tmp_path):
    with pytest.raises(ValueError, match="suppress='negative'"):
        trainer("dpo", tmp_path, loss="reps", peft_config=LoraConfig(target_modules="all-linear"))
    loss = get_loss("reps", suppress="negative")
    trained("dpo", tmp_path, loss=loss, peft_config=LoraConfig(target_modules="all-linear"), max_steps=1)


@pytest.mark.parametrize("suppress", ["null", "negative"])
def test_reps_trains_a_vector(suppress, tmp_path):
    made = trained("dpo", tmp_path, loss=get_loss("reps", suppress=suppress), max_steps=12)
    first, *_, last = losses(made)
    assert last < first


@torch.no_grad()
def test_strength_of_a_callers_own_is_what_at_1_sees():
    model = steered()
    with set_strength(model, 2.0):
        doubled = at(model)(1).token_logps
    assert torch.equal(doubled, at(model)(2).token_logps)


@torch.no_grad()
def test_completion_positions_are_those_of_generation():
    model, words = steered(positions="completion"), tokenizer()
    prompt = words("the cat runs", return_tensors="pt")
    written = model.generate(
        input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=6, min_new_tokens=6,
        do_sample=False, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    ids = written.sequences
    labels = ids.clone()
    labels[:, :3] = -100
    scored = token_logps(
        model, model, Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, False)
    )
    logits = torch.stack(written.logits, dim=1).log_softmax(-1)
    expected = logits.gather(2, ids[:, 3:, None]).squeeze(2)
    torch.testing.assert_close(scored.token_logps, expected, atol=1e-5, rtol=1e-5)
