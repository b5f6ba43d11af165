"""The frozen prefix changes what a step costs and nothing else."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import fill, tiny
from peft import LoraConfig, get_peft_model
from tiny_data import demonstrations, history, pairs, trained, values

from steertune.adapters import SteeringVectorConfig
from steertune.trainers import Batch, FrozenPrefix, ModelAt
from steertune.trainers.prefix import shortcut as shortcut_module
from steertune.trainers.prefix.decoder import Decoder


@pytest.fixture(autouse=True)
def hears_everything(caplog):
    caplog.set_level(logging.INFO, logger="steertune.trainers.prefix")


@pytest.fixture
def tokens_run(monkeypatch):
    """Rows x columns of every pass through the blocks above the cut."""
    seen = []
    run = Decoder.run

    def spy(self, call, state):
        seen.append(tuple(call["input_ids"].shape))
        return run(self, call, state)

    monkeypatch.setattr(Decoder, "run", spy)
    return seen


@pytest.fixture
def splits_run(monkeypatch):
    """The splits that were really used."""
    seen = []
    run = shortcut_module.run_split

    def spy(model, decoder, call, states, split):
        seen.append(split)
        return run(model, decoder, call, states, split)

    monkeypatch.setattr(shortcut_module, "run_split", spy)
    return seen


def both_ways(kind: str, folder, model=tiny, **options):
    """The same training with the memo and without it."""
    prefix = FrozenPrefix()
    ours = trained(kind, folder / "memo", model=model(), frozen_prefix=prefix, **options)
    plain = trained(kind, folder / "plain", model=model(), frozen_prefix=False, **options)
    return ours, plain, prefix


def assert_equal(ours, plain, tolerance: float = 1e-5) -> None:
    for mine, other in zip(history(ours, "loss", "grad_norm"), history(plain, "loss", "grad_norm"), strict=True):
        assert mine == pytest.approx(other, abs=tolerance, rel=tolerance)
    for name, value in values(ours.model).items():
        torch.testing.assert_close(value, dict(plain.model.named_parameters())[name], atol=tolerance, rtol=tolerance)


def pair_batch(prompts=(5, 3), answers=((2, 4), (3, 1)), seed=0) -> Batch:
    """Two pairs, padded on the right; answers are `(chosen, rejected)` lengths and start differently."""
    generator = torch.Generator().manual_seed(seed)
    rows, starts = [], []
    for side in (0, 1):
        generator_of_prompts = torch.Generator().manual_seed(7)
        for prompt, lengths in zip(prompts, answers, strict=True):
            head = torch.randint(3, 64, (prompt,), generator=generator_of_prompts)
            tail = torch.randint(3, 64, (lengths[side],), generator=generator)
            tail[0] = 3 + side
            rows.append(torch.cat([head, tail]))
            starts.append(prompt)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    column = torch.arange(ids.shape[1])
    labels = ids.masked_fill((mask == 0) | (column < torch.tensor(starts)[:, None]), -100)
    return Batch({"input_ids": ids, "attention_mask": mask}, labels, pairs=True)


def with_gradients(model, batch, shortcut):
    """Token log-probabilities at strength 1, and the gradients of their sum of squares."""
    model.zero_grad()
    at = ModelAt(model, model, batch)
    if shortcut is None:
        outputs = at(1)
    else:
        with shortcut.on():
            outputs = at(1)
    outputs.token_logps.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    return outputs.token_logps.detach(), gradients


def assert_same_with_shortcut(model, batch, training=True):
    prefix = FrozenPrefix()
    plain, gradients = with_gradients(model, batch, None)
    for _ in range(2):  # filling the memo, and reading it
        ours, found = with_gradients(model, batch, prefix.shortcut(model, training))
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
    return prefix


# -- equal to the plain path ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dpo", "sft", "plain"])
def test_training_is_equal_on_every_architecture(architecture, kind, tmp_path, caplog):
    data = pairs() if kind == "dpo" else demonstrations()
    loss = "dpo" if kind == "dpo" else "cross_entropy"
    ours, plain, prefix = both_ways(kind, tmp_path, lambda: tiny(architecture), data=data, loss=loss)
    assert not caplog.records
    assert len(prefix.memo) >= len(data)
    assert_equal(ours, plain)


@pytest.mark.parametrize("positions", ["all", "completion", "prompt", "last_prompt"])
def test_shared_prompts_are_exact_on_every_architecture(architecture, positions, splits_run, caplog):
    model = get_peft_model(tiny(architecture), SteeringVectorConfig(positions=positions))
    fill(model)
    assert_same_with_shortcut(model, pair_batch())
    assert not caplog.records and len(splits_run) >= 2


@pytest.mark.parametrize("form", ["gated", "linear", "low_rank"])
@pytest.mark.parametrize("norm", [dict(norm="free"), dict(norm="preserve"), dict(norm="capped", norm_value=0.5)])
def test_forms_and_norms(form, norm, splits_run):
    rank = dict(rank=2) if form == "low_rank" else {}
    model = get_peft_model(tiny(), SteeringVectorConfig(form=form, layers=[1, 3], **norm, **rank))
    fill(model)
    assert_same_with_shortcut(model, pair_batch())
    assert splits_run


@pytest.mark.parametrize("site", ["attention", "mlp"])
def test_a_site_inside_a_block_keeps_that_block(site):
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=2, site=site))
    fill(model)
    assert FrozenPrefix().shortcut(model, True).skipped == 2
    assert_same_with_shortcut(model, pair_batch())


def test_lora_on_upper_layers_skips_and_on_all_layers_shares_prompts(splits_run):
    for layers, skipped in (([2, 3], 2), (None, 0)):
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=layers)
        model = get_peft_model(tiny(), config)
        fill_lora(model)
        assert FrozenPrefix().shortcut(model, True).skipped == skipped
        before = len(splits_run)
        assert_same_with_shortcut(model, pair_batch())
        assert len(splits_run) > before


def fill_lora(model) -> None:
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)


def test_blocks_below_do_not_run_and_prompts_run_once(tokens_run):
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=2))
    fill(model)
    shortcut, batch = FrozenPrefix().shortcut(model, True), pair_batch()
    with shortcut.on():
        ModelAt(model, model, batch)(1)
    ran = []
    for block in model.get_base_model().model.layers:
        block.self_attn.register_forward_pre_hook(lambda module, _: ran.append(module.layer_idx))
    tokens_run.clear()
    with shortcut.on():
        ModelAt(model, model, batch)(1)
    assert ran == [3, 3]  # the vector is on the output of block 2
    assert tokens_run == [(2, 5), (4, 4)], "two prompts of up to 5 tokens, four answers of up to 4"
