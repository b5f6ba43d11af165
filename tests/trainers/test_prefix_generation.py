"""Prompts of a generation in one line of tokens: the same answers, and each beginning runs once."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from prefixes import complaints, fill_lora
from tiny_models import fill, tiny

from steertune.adapters import SteeringVectorConfig, set_strength
from steertune.trainers import FrozenPrefix
from steertune.trainers.prefix import generation
from steertune.trainers.prefix.cached_pass import CachedPass

SYSTEM = 4


@pytest.fixture
def lines(monkeypatch):
    """Tokens of the lines that filled a cache."""
    used, run = [], CachedPass._run_packed

    def noting(self, call, h, layout, *more):
        if more:
            used.append(len(layout.row_T))
        return run(self, call, h, layout, *more)

    monkeypatch.setattr(CachedPass, "_run_packed", noting)
    return used


def prompts(lengths=(9, 5, 7)) -> dict[str, torch.Tensor]:
    """Prompts that begin with the same tokens, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randint(3, 64, (SYSTEM,), generator=generator)
    rows = [torch.cat([head, torch.randint(3, 64, (n - SYSTEM,), generator=generator)]) for n in lengths]
    ids = torch.stack([torch.cat([torch.zeros(max(lengths) - len(row), dtype=torch.long), row]) for row in rows])
    column = torch.arange(max(lengths))
    return {"input_ids": ids, "attention_mask": (column >= max(lengths) - torch.tensor(lengths)[:, None]).long()}


def vector(**switches):
    model = get_peft_model(tiny(), SteeringVectorConfig(**{"layers": 2, **switches}))
    fill(model)
    return model.eval()


def lora():
    model = get_peft_model(tiny(), LoraConfig(target_modules="all-linear"))
    fill_lora(model)
    return model.eval()


def generated(model):
    return model.generate(
        **prompts(),
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )


@pytest.mark.parametrize("make", [lambda: tiny().eval(), vector, lambda: vector(site="attention"), lora])
def test_a_generation_is_the_same_and_runs_each_beginning_once(make, lines, caplog):
    caplog.set_level(logging.INFO, logger="steertune.trainers.prefix")
    model, prefix = make(), FrozenPrefix()
    plain = generated(model)
    for _ in range(2):
        lines.clear()
        with prefix.on(model, labels_only=True):
            ours = generated(model)
        assert torch.equal(ours.sequences, plain.sequences)
        for mine, other in zip(ours.logits, plain.logits, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
        mine, other = ours.past_key_values, plain.past_key_values
        assert mine.get_seq_length() == other.get_seq_length()
        real = torch.cat([prompts()["attention_mask"].bool(), torch.ones(3, 5, dtype=torch.bool)], dim=1)
        for one, two in zip(mine.layers, other.layers, strict=True):
            for name in ("keys", "values"):
                a, b = (getattr(layer, name).transpose(1, 2)[real] for layer in (one, two))
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    # the second time without a proof: 3 rows of 21 tokens, of which two times 4 are the first row's
    assert lines == [13]
    assert not any("prompts keep their padding" in record.getMessage() for record in caplog.records)


def test_a_strength_counts(lines):
    model, prefix = vector(), FrozenPrefix()
    with set_strength(model, 3.0):
        plain = generated(model)
        with prefix.on(model):
            ours = generated(model)
    assert lines and torch.equal(ours.sequences, plain.sequences)
    torch.testing.assert_close(ours.logits[0], plain.logits[0], atol=1e-4, rtol=1e-4)


def test_vectors_that_look_at_positions_let_prompts_run_as_they_are(lines):
    model = vector(positions="completion")
    plain = generated(model)
    with FrozenPrefix().on(model):
        assert torch.equal(generated(model).sequences, plain.sequences)
    assert not lines


def test_keys_that_differ_leave_the_plain_path(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="steertune.trainers.prefix")
    model, rows = vector(), generation._rows
    plain = generated(model)
    monkeypatch.setattr(generation, "_rows", lambda *args: rows(*args) * 1.01)
    with FrozenPrefix().on(model):
        assert torch.equal(generated(model).sequences, plain.sequences)
    assert any("keys or values differ" in message for message in complaints(caplog))
