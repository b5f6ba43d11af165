"""Run a decoder from a given state at the output of one block, without running the blocks up to it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.blocks import find_blocks
from .cut import NoPrefix, base_of

States = Callable[[dict[str, Any]], Tensor | None]
"""From the arguments of a decoder's forward to the output of its last skipped block, or None to run them all."""


class _Reached(Exception):
    """The state at the cut, carried out of the forward pass."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class SkippedBlocks:
    """The first `count` decoder blocks of a model, skippable.

    While `on(states)`, every forward of the decoder first asks `states` for the output of block `count - 1`. Given
    one, the skipped blocks compute nothing: each hands on what it got, and the last one hands on that state, so its
    forward hooks (a steering vector) still work on it.

    Args:
        model: A transformers model, with or without PEFT.
        count: How many blocks to skip.

    Raises:
        NoPrefix: the blocks do not belong to one decoder that takes `input_ids`.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        base = base_of(model)
        blocks = find_blocks(base)
        self.blocks = [block for _, block in blocks[:count]]
        list_name = blocks[0][0].rpartition(".")[0]
        self.decoder = base.get_submodule(list_name.rpartition(".")[0])
        self._signature = inspect.signature(type(self.decoder).forward)
        if "input_ids" not in self._signature.parameters:
            raise NoPrefix(f"{type(self.decoder).__name__} does not take input_ids")
        self._tuples: dict[nn.Module, int] = {}  # blocks that return tuples, and how long these are
        self._state: Tensor | None = None
        self._plain: Callable[..., Any] = self.decoder.forward
        self._stop = False
        self._on = False

    @contextmanager
    def on(self, states: States) -> Iterator[None]:
        """Skip inside, wherever `states` gives a state."""
        if self._on:  # an evaluation step inside an evaluation step
            yield
            return
        self._on = True
        try:
            with _forwards(
                {self.decoder: self._decoder(states)} | {block: self._block(block) for block in self.blocks}
            ):
                yield
        finally:
            self._on = False

    @torch.no_grad()
    def run(self, call: Mapping[str, Any]) -> Tensor:
        """The output of the last skipped block, computed. Only inside `on`.

        Args:
            call: Arguments of the decoder.
        """
        state, self._state, self._stop = self._state, None, True
        try:
            self._plain(**call)
        except _Reached as reached:
            return reached.hidden.detach()
        finally:
            self._state, self._stop = state, False
        raise NoPrefix(f"{type(self.decoder).__name__} never ran block {len(self.blocks) - 1}")

    def run_all(self, call: Mapping[str, Any], state: Tensor | None) -> Tensor:
        """The decoder's last hidden states, from a state at the cut or (None) from the tokens. Only inside `on`."""
        before, self._state = self._state, state
        try:
            return self._plain(**call)[0]
        finally:
            self._state = before

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The decoder's arguments by name."""
        given = self._signature.bind(self.decoder, *args, **kwargs).arguments
        by_name = {name: value for name, value in given.items() if name != "self"}
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                by_name |= by_name.pop(name, {})
        return by_name

    def _decoder(self, states: States) -> Callable[..., Any]:
        plain = self._plain = self.decoder.forward

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            before, self._state = self._state, states(self.arguments(args, kwargs))
            try:
                return plain(*args, **kwargs)
            finally:
                self._state = before

        return forward

    def _block(self, block: nn.Module) -> Callable[..., Any]:
        plain = block.forward
        last = block is self.blocks[-1]

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._state is None:
                output = plain(*args, **kwargs)
                if isinstance(output, tuple):
                    self._tuples[block] = len(output)
                if last and self._stop:
                    raise _Reached(output[0] if isinstance(output, tuple) else output)
                return output
            hidden = self._state if last else (args[0] if args else kwargs["hidden_states"])
            length = self._tuples.get(block)
            return hidden if length is None else (hidden, *[None] * (length - 1))

        return forward


@contextmanager
def _forwards(new: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Other `forward`s for some modules, put back at the end (also where one stood on the instance before)."""
    before = {module: vars(module).get("forward") for module in new}
    for module, forward in new.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
