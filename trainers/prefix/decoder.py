"""A stack of decoder blocks that can start at a block in the middle, from the state after the blocks below it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ...adapters import SteeringVectorLayer, steering_layers
from ...adapters.blocks import find_blocks, find_stack
from ...adapters.caches import CACHE_NAMES
from ...adapters.observing import ADAPTER_LAYERS, base_model
from ...adapters.outputs import states_in
from ..training_changes import changed_in_training
from .checkpointing import not_recomputable, replaced_forwards, run_again_alike
from .exactness import NoPrefix

Replacement = Callable[[dict[str, Any]], Any | None]
"""Maps the arguments of a decoder's forward to its output; None lets the decoder run as usual."""


def frozen_blocks(model: nn.Module, training: bool) -> int:
    """Number of decoder blocks whose outputs neither an adapter nor, in training, a trained parameter changes.

    A steering vector on the output of block `i` does not change that block itself: `i + 1` blocks are frozen.

    Raises:
        NoPrefix: the model has no such stack.
    """
    try:
        blocks = find_blocks(base_model(model))
    except ValueError as error:
        raise NoPrefix(str(error)) from error
    # no adapter and nothing trained in any block: all of them
    i = lowest_changed(model, training)
    if i is None:
        return len(blocks)
    name, block = blocks[i]
    # what is added to the output of a block comes after it, so the block itself is frozen
    inside, _ = _changes(block, training)
    if inside and i == 0:
        raise NoPrefix(
            f"the lowest layer that is trained or adapted is 0 ({name}): nothing lies below it. Train higher layers "
            "(layers=) to leave some out"
        )
    return i if inside else i + 1


def lowest_changed(model: nn.Module, training: bool) -> int | None:
    """The lowest decoder block whose output an adapter or, in training, a trained parameter changes; None if none.

    Raises:
        ValueError: the model's blocks are unknown.
    """
    for i, (_, block) in enumerate(find_blocks(base_model(model))):
        if any(_changes(block, training)):
            return i
    return None


def _changes(block: nn.Module, training: bool) -> tuple[bool, bool]:
    """Whether something changes what a block computes, and whether something is added to its output."""
    # a steering layer that is a child of the block changes its output; deeper ones are inside
    inside, after, owned = False, False, set()
    for module in block.modules():
        # inductive biases can change a block's output, or modules inside it, in training only
        if training and changed_in_training(module):
            after, inside = after or module is block, inside or module is not block
        if isinstance(module, ADAPTER_LAYERS):
            if isinstance(module, SteeringVectorLayer) and module in block.children():
                after = True
                owned |= {id(p) for p in module.parameters()}
            else:
                inside = True
    # parameters of a vector on the output do not belong to the block itself
    trained = training and any(p.requires_grad and id(p) not in owned for p in block.parameters())
    return inside or trained, after


class _Reached(Exception):
    """Raised to leave the forward pass with the state after the cached prefix."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Decoder:
    """The stack of decoder blocks of a model, of which the first `count` can be skipped.

    While `on(replacement)`, every forward of the stack first calls the replacement, which can `run` it from a state:
    the skipped blocks then compute nothing. Each skipped block returns its input unchanged, and the last one returns
    the given state, so its forward hooks (a steering vector) still work on it.

    Args:
        model: A transformers model, with or without PEFT.
        count: How many blocks can be skipped.

    Raises:
        NoPrefix: the blocks do not belong to one module that takes `input_ids`.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        base = base_model(model)
        try:
            blocks = find_blocks(base)
        except ValueError as error:
            raise NoPrefix(str(error)) from error
        self.depth, self.count = len(blocks), count
        self.blocks = [block for _, block in blocks]
        self._skipped = self.blocks[:count]
        self.module = find_stack(base)
        # the class declares what its forward takes, also where remote code accepts anything
        self._signature = inspect.signature(type(self.module).forward)
        if not self.takes("input_ids"):
            raise NoPrefix(f"{type(self.module).__name__} does not take input_ids")
        # the name of the argument and output that hold keys and values, "" if there is none
        self.cache = next((name for name in CACHE_NAMES if self.takes(name)), "")
        self._tuples: dict[nn.Module, int] = {}  # blocks that return tuples, and how long these are
        self._state: Tensor | None = None
        self._plain: Callable[..., Any] = self.module.forward
        self._stop = self.is_on = False

    def takes(self, *names: str) -> bool:
        """Whether the stack's forward has arguments of these names."""
        return all(name in self._signature.parameters for name in names)

    def inside(self, count: int) -> Iterator[nn.Module]:
        """All modules of the first `count` blocks, except steering layers."""
        for block in self.blocks[:count]:
            steering = {m for layer in steering_layers(block) for m in layer.modules()}
            yield from (module for module in block.modules() if module not in steering)

    @property
    def packs(self) -> bool:
        """Whether it can run packed rows, because its attention goes through transformers' `AttentionInterface`."""
        module: Any = self.module
        # Models that compute attention themselves lack this flag, and eager attention is the model's own function.
        interfaced = bool(getattr(module, "_supports_attention_backend", False))  # transformers has no public name
        plain = getattr(module.config, "_attn_implementation", None) in AttentionInterface()
        return interfaced and plain and self.takes("position_ids")

    def not_recomputable(self) -> str | None:
        """The reason why blocks cannot be skipped with the current gradient checkpointing; None if they can."""
        return not_recomputable(self.module, self.blocks)

    @contextmanager
    def on(self, replacement: Replacement) -> Iterator[None]:
        """Call `replacement` before every forward inside the context."""
        if self.is_on:  # an evaluation step inside an evaluation step
            yield
            return
        self.is_on = True
        # forwards on the instances, so that hooks of the modules still run
        new = {self.module: self._stack(replacement)} | {block: self._block(block) for block in self._skipped}
        try:
            with replaced_forwards(new):
                yield
        finally:
            self.is_on = False

    @torch.no_grad()
    def state(self, call: Mapping[str, Any]) -> Tensor:
        """The output of the last block that can be skipped. Only inside `on`.

        Args:
            call: Arguments of the stack.
        """
        # An exception ends the pass at the last block to be skipped, and carries the state out.
        before, self._state, self._stop = self._state, None, True
        try:
            self._plain(**call)
        except _Reached as reached:
            return reached.hidden.detach()
        finally:
            self._state, self._stop = before, False
        raise NoPrefix(f"{type(self.module).__name__} never ran block {self.count - 1}")

    def run(self, call: Mapping[str, Any], state: Tensor | None) -> Any:
        """The stack's output, from a state after the blocks that can be skipped or (None) from the tokens. Only inside
        `on`."""
        before, self._state = self._state, state
        # blocks that compute nothing need not be run again in the backward pass
        left_out = () if state is None else self._skipped
        cached = call.get(self.cache) is not None
        try:
            with run_again_alike(self.module, self.blocks, left_out, cached):
                return self._plain(**call)
        finally:
            self._state = before

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        # arguments by name, however the model passes them
        given = self._signature.bind(self.module, *args, **kwargs).arguments
        by_name = {name: value for name, value in given.items() if name != "self"}
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                by_name |= by_name.pop(name, {})
        return by_name

    def _stack(self, replacement: Replacement) -> Callable[..., Any]:
        plain = self._plain = self.module.forward

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            # the replacement can run the stack itself, from a state or in another layout
            output = replacement(self._arguments(args, kwargs))
            if output is not None:
                return output
            with run_again_alike(self.module, self.blocks):
                return plain(*args, **kwargs)

        return forward

    def _block(self, block: nn.Module) -> Callable[..., Any]:
        plain = block.forward
        last = block is self._skipped[-1]

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            # nothing is skipped in this pass
            if self._state is None:
                output = plain(*args, **kwargs)
                if isinstance(output, tuple):
                    self._tuples[block] = len(output)
                if last and self._stop:
                    raise _Reached(states_in(output))
                return output
            # skipped: each block returns its input unchanged, and the last one the state
            hidden = self._state if last else (args[0] if args else kwargs["hidden_states"])
            length = self._tuples.get(block)
            return hidden if length is None else (hidden, *[None] * (length - 1))

        return forward
