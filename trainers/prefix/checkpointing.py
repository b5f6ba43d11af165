"""Gradient checkpointing that recomputes a block exactly as it ran.

The backward pass runs a checkpointed block a second time, when the forward pass is over: other passes have been made
since, blocks that were skipped would run, and a cache of keys and values has been written to. transformers therefore
drops caches, and the steering layers inside a block no longer know which tokens to steer. Here a block is checkpointed
as its `forward`, together with everything that it depends on besides its arguments.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ...adapters import steering_layers
from . import packing

_FLAG = "gradient_checkpointing"  # transformers', on blocks and on the stack


def not_recomputable(stack: nn.Module, blocks: Sequence[nn.Module]) -> str | None:
    """The reason why skipped blocks would be missing when the backward pass runs checkpointed blocks again.

    Args:
        stack: The module whose forward runs the blocks.
        blocks: The blocks.

    Returns:
        The reason and what to set; None if nothing is checkpointed, or if everything can be recomputed as it ran.
    """
    if _flagged(stack) and not any(hasattr(block, _FLAG) for block in blocks):
        return f"{type(stack).__name__} checkpoints its blocks in its own way. Set gradient_checkpointing=False"
    if any(_flagged(block) and _is_reentrant(block) for block in blocks):
        return (
            "reentrant gradient checkpointing needs gradients of the embeddings. Set gradient_checkpointing_kwargs="
            "{'use_reentrant': False} (the default), or gradient_checkpointing=False"
        )
    return None


@contextmanager
def run_again_alike(
    stack: nn.Module, blocks: Sequence[nn.Module], left_out: Sequence[nn.Module] = (), cached: bool = False
) -> Iterator[None]:
    """Context for a forward pass of the stack, in whose backward pass checkpointed blocks run exactly as they ran.

    Args:
        stack: The module whose forward runs the blocks.
        blocks: Its blocks.
        left_out: The blocks that compute nothing in this pass, and need not run again.
        cached: Whether the pass gets a cache of keys and values, which transformers would drop.
    """
    # blocks that transformers would checkpoint, and the function it would use
    functions = {block: _function_of(block) for block in blocks if _flagged(block)}
    checkpointed = {block: function for block, function in functions.items() if function is not None}
    if not checkpointed:
        yield
        return
    # transformers' own checkpointing is disabled inside, also that of modules inside a block
    switched = [module for block in checkpointed for module in block.modules() if getattr(module, _FLAG, False)]
    if cached and _flagged(stack):
        switched.append(stack)
    forwards = {
        block: _checkpointed(block, function)
        for block, function in checkpointed.items()
        if torch.is_grad_enabled() and block not in left_out
    }
    with _off(switched), replaced_forwards(forwards):
        yield


def _flagged(module: nn.Module) -> bool:
    return module.training and bool(getattr(module, _FLAG, False))


def _function_of(block: nn.Module) -> Callable[..., Any] | None:
    """`torch.utils.checkpoint.checkpoint` with the user's options; transformers has no public name for it."""
    return getattr(block, "_gradient_checkpointing_func", None)


def _is_reentrant(block: nn.Module) -> bool:
    """Whether reentrant checkpointing is requested, which is torch's default."""
    function = _function_of(block)
    return not isinstance(function, functools.partial) or function.keywords.get("use_reentrant") is not False


def _checkpointed(block: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """The block's forward under `function`, which calls it now and in the backward pass."""
    plain = block.forward
    switched = [module for module in block.modules() if getattr(module, _FLAG, False)]

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):  # a pass without gradients
            return plain(*args, **kwargs)
        # all that a block depends on besides its arguments: prompts, the layout of packed rows, strengths
        circumstances: list[Callable[[], AbstractContextManager[None]]]
        circumstances = [boundary.snapshot() for boundary in {layer.boundary for layer in steering_layers(block)}]
        circumstances += [packing.snapshot()]
        circumstances += [functools.partial(_strength, layer, {**layer.strength}) for layer in steering_layers(block)]
        # a cache is an argument that the block changes
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        before = None if cache is None else _copied(cache)
        written: list[Cache] = []  # the cache after the forward pass

        def run(*args: Any) -> Any:
            given, copied = {**kwargs}, None
            if before is not None:  # each run writes to its own cache
                copied = _copied(before)
                args = tuple(copied if value is cache else value for value in args)
                given = {name: copied if value is cache else value for name, value in kwargs.items()}
            # the same circumstances now and in the backward pass
            with ExitStack() as stack:
                for circumstance in circumstances:
                    stack.enter_context(circumstance())
                stack.enter_context(_off(switched))
                output = plain(*args, **given)
            if copied is not None and not written:
                written.append(copied)
            return output

        # the caller's cache holds what the first run wrote
        output = function(run, *args)
        if cache is not None:
            cache.layers[:] = written[0].layers
        return output

    return forward


def _copied(cache: Cache) -> Cache:
    """A cache with the same keys and values; writing to one does not change the other."""
    # layers replace their tensors when they write, so shallow copies are enough
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


@contextmanager
def _strength(layer: Any, strength: Mapping[str, Any]) -> Iterator[None]:
    before = {**layer.strength}
    layer.strength.update(strength)
    try:
        yield
    finally:
        layer.strength.update(before)


@contextmanager
def _off(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Disable checkpointing by transformers inside the context."""
    before = [(module, getattr(module, _FLAG)) for module in modules]
    for module in modules:
        setattr(module, _FLAG, False)
    try:
        yield
    finally:
        for module, value in before:
            setattr(module, _FLAG, value)


@contextmanager
def replaced_forwards(new: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the `forward` of some modules inside the context (also if the instance already had its own)."""
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
