"""Read and replace the states in a module's output: a tensor, or the first item of a tuple in some architectures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def states_in(output: Any) -> Any:
    """The states in a module's output."""
    return output[0] if isinstance(output, tuple) else output


def with_states(output: Any, states: Any) -> Any:
    """A module's output with its states replaced."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


@contextmanager
def adding(module: nn.Module, change: Tensor) -> Iterator[None]:
    """Add a change to the states that a module returns, in every forward pass inside the context.

    Args:
        module: A module such as a decoder block.
        change: The tensor to add, broadcast to `(rows, tokens, d)` and converted to the states' device and dtype.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        h_RCD = states_in(output)
        return with_states(output, h_RCD + change.to(h_RCD))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
