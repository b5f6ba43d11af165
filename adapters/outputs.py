"""What a module returns: residual states, alone or first in a tuple, as decoder blocks do in some architectures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def states_in(output: Any) -> Any:
    """The states in a module's output."""
    return output[0] if isinstance(output, tuple) else output


def with_states(output: Any, states: Any) -> Any:
    """A module's output with other states in it."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


@contextmanager
def adding(module: nn.Module, change: Tensor) -> Iterator[None]:
    """Forward passes inside add a change to the states that a module returns.

    Args:
        module: Such as a decoder block.
        change: What is added, of a shape that fits `(rows, tokens, d)`; taken to the states' device and dtype.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        h_RCD = states_in(output)
        return with_states(output, h_RCD + change.to(h_RCD))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
