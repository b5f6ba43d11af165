"""The frozen prefix changes what a step costs and nothing else."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny
from tiny_data import demonstrations, history, pairs, trained, values

from steertune.trainers import FrozenPrefix


def blocks_run(model: torch.nn.Module) -> list[list[torch.Tensor]]:
    """Per decoder block of a tiny Llama, what its attention was given; filled by every forward pass."""
    seen: list[list[torch.Tensor]] = []
    for layer in model.get_base_model().model.layers:
        seen.append([])
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, mine=seen[-1]: mine.append(kwargs["hidden_states"].shape), with_kwargs=True
        )
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


@pytest.mark.parametrize("kind", ["dpo", "sft", "plain"])
def test_equal_on_every_architecture(architecture, kind, tmp_path, caplog):
    data = demonstrations() if kind != "dpo" else pairs()
    loss = "dpo" if kind == "dpo" else "cross_entropy"
    ours, plain, prefix = both_ways(kind, tmp_path, lambda: tiny(architecture), data=data, loss=loss)
    assert "is off" not in caplog.text
    assert len(prefix.memo) >= len(data)
    assert_equal(ours, plain)
