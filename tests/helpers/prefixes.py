"""A step with and without the cached prefix."""

from __future__ import annotations

import pytest
import torch
from tiny_data import history, trained, values
from tiny_models import of_the_prefix, tiny

from steertune.trainers import Batch, FrozenPrefix, ModelAt


def both_ways(kind: str, folder, model=tiny, **options):
    """The same training with the memo and without it."""
    prefix = FrozenPrefix()
    ours = trained(kind, folder / "memo", model=model(), frozen_prefix=prefix, **options)
    plain = trained(kind, folder / "plain", model=model(), frozen_prefix=False, **options)
    return ours, plain, prefix


def assert_equal(ours, plain, tolerance: float = 1e-4) -> None:
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


def complaints(caplog) -> list[str]:
    """What the prefix has said, but for the line that an architecture's own attention keeps the padding."""
    messages = [record.getMessage() for record in of_the_prefix(caplog)]
    return [message for message in messages if "rows keep their padding" not in message]


def fill_lora(model) -> None:
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)


def off_because(caplog: pytest.LogCaptureFixture, text: str) -> None:
    """The prefix has said that it is off, with this reason."""
    assert any(text in record.getMessage() for record in of_the_prefix(caplog)), caplog.text
