"""Whether a pass through a model draws random numbers in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.observing import training

_TOKENS = 8


def draws(model: nn.Module, row: Mapping[str, Tensor], run: Callable[[Mapping[str, Tensor]], Any]) -> tuple[Any, bool]:
    """What `run` gives for the last tokens of a row in training mode, and whether it drew a random number for that.

    Args:
        model: Whose mode counts.
        row: Inputs of one row, `(1, tokens)`, with no padding at the end.
        run: A pass of the model.
    """
    device = row["input_ids"].device
    devices = [device] if device.type == "cuda" else []
    with training(model), torch.random.fork_rng(devices), torch.no_grad():
        before = _states(devices)
        found = run(last_tokens(row))
        return found, not all(map(torch.equal, before, _states(devices)))


def draws_again(device: torch.device) -> Callable[[], None]:
    """A function that makes the random numbers drawn from now on be drawn once more.

    Args:
        device: Where the model runs.
    """
    devices = [device] if device.type == "cuda" else []
    before = _states(devices)

    def rewind() -> None:
        torch.set_rng_state(before[0])
        for device, state in zip(devices, before[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    return rewind


def last_tokens(row: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The end of a row: enough to see which modules run, and how."""
    return {name: value[:, -_TOKENS:] for name, value in row.items()}


def _states(devices: Sequence[torch.device]) -> list[Tensor]:
    """Whoever draws a random number changes them."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
