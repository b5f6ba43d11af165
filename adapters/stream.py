"""The typical size of the residual stream where a vector is written, measured once on a fixed text.

The size of a state h of width d is `√d · median |h_i| / 0.6745`: its norm if it were Gaussian with these typical
entries. The norm itself is not suitable. A few entries of the stream are massive on every token and carry no
information about it; in Gemma-3-270M they are 80 % of the norm, in SmolLM2-135M half of it. The effect of a move
depends on its size relative to the other entries.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import find_blocks, find_stack
from .observing import evaluating
from .outputs import states_in

ROWS, TOKENS = 2, 64
FIRST = 4
"""Tokens at the beginning of a row that are left out, because models have massive activations there (a norm of 22,600
on the first token of SmolLM2-135M, and of 240 on the others)."""
_DIGITS = 3  # significant digits of a size, so that machines which round differently agree
logger = logging.getLogger(__name__)


@torch.no_grad()
def stream_sizes(model: nn.Module, modules: Mapping[int, str], sharded: bool = False) -> dict[int, float]:
    """Median size over tokens of the residual stream that each module writes to.

    For a block this is the size of its output. An attention or MLP module writes to the stream through whatever
    follows it (nothing in Llama, a norm in Gemma, a factor in Granite). So its output is moved a little, and the size
    is the length of a move that would change the block's output by its own size: `size(output) · |move| / |change of
    the output|`.

    The text consists of fixed token ids. It needs no tokenizer, and sizes on it are within a third of those on
    English.

    Args:
        model: The base model, adapters off.
        modules: Layer index -> full name of the module whose output is steered.
        sharded: Whether sharded weights are gathered while the model runs, on all processes at once.

    Returns:
        Layer index -> size. Empty, with a warning that gives the reason, if the model cannot be run (its weights are
        sharded or on the meta device, or it is not a transformers model).
    """
    if why := _cannot_run(model, sharded):
        logger.warning("The size of the residual stream was not measured: %s.", why)
        return {}
    sizes: dict[int, list[Tensor]] = {layer: [] for layer in modules}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for layer, name in modules.items():
            module, block = model.get_submodule(name), _block_around(model, name)
            if block is None or block is module:
                handle = module.register_forward_hook(_keep_size(sizes[layer]))
            else:
                handle = block.register_forward_hook(_keep_lever(sizes[layer], module), with_kwargs=True)
            stack.callback(handle.remove)
        try:
            _run(model)
        except Exception as error:
            logger.warning("The size of the residual stream was not measured: %s: %s.", type(error).__name__, error)
            return {}
    medians = {layer: float(torch.cat(of_layer).nanmedian()) for layer, of_layer in sizes.items() if of_layer}
    if any(not 0 < size < float("inf") for size in medians.values()) or len(medians) < len(modules):
        logger.warning("The size of the residual stream was not measured: on the fixed text it is %s.", medians)
        return {}
    return {layer: float(f"{size:.{_DIGITS}g}") for layer, size in medians.items()}


def _cannot_run(model: nn.Module, sharded: bool) -> str | None:
    """The reason why the model cannot be run, or None."""
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        return f"{type(model).__name__} is not a transformers model"
    for name, parameter in model.named_parameters():
        if parameter.is_meta or (not sharded and is_sharded(parameter)):
            return f"{name} is sharded or on the meta device"
    return None


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter holds only a share of its values on this process."""
    return hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id")  # FSDP2's, and ZeRO-3's


def _run(model: nn.Module) -> None:
    """One pass over the fixed text, through the decoder alone if possible (the head is not needed)."""
    embeddings: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or TOKENS  # pyright: ignore
    length = min(TOKENS, longest)
    # A prime step covers the whole vocabulary.
    ids = (torch.arange(ROWS * length) * 7919 + 101) % embeddings.num_embeddings
    ids = ids.view(ROWS, length).to(embeddings.weight.device)  # (rows, tokens)
    try:
        decoder = find_stack(model)
    except ValueError:
        decoder = model
    whole = any(map(is_sharded, model.parameters()))  # FSDP takes the first module that runs for its root
    if whole or "input_ids" not in inspect.signature(type(decoder).forward).parameters:
        decoder = model
    options = {"use_cache": False} if "use_cache" in inspect.signature(type(decoder).forward).parameters else {}
    decoder(input_ids=ids, **options)


def _states(output: Any) -> Tensor:
    """The residual states in a module's output, `(rows, tokens, d)`, in fp32 and without the first tokens."""
    states = states_in(output)
    return states[:, min(FIRST, states.shape[1] - 1) :].float()


def _size(states: Tensor) -> Tensor:
    """The sizes `(...)` of states `(..., d)`."""
    gaussian_median = 0.6745  # median of |x| for a standard normal x
    return states.abs().median(dim=-1).values * states.shape[-1] ** 0.5 / gaussian_median


def _keep_size(sizes: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        sizes.append(_size(_states(output)).flatten().cpu())

    return hook


def _keep_lever(sizes: list[Tensor], inner: nn.Module) -> Any:
    """A hook on a block: it runs the block again with the output of `inner` moved, and records
    `size(output) · |move| / |change|` for every token."""
    running = False

    def hook(block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal running
        if running:  # the second run
            return
        moves: list[Tensor] = []

        def move(module: nn.Module, args: Any, inner_output: Any) -> Any:
            states = inner_output[0] if isinstance(inner_output, tuple) else inner_output
            generator = torch.Generator().manual_seed(0)
            direction = torch.randn(states.shape[-1], generator=generator).to(states.device)
            moves.append(direction * _states(inner_output).norm(dim=-1).median() / direction.norm())
            moved = states + moves[-1].to(states.dtype)
            return (moved, *inner_output[1:]) if isinstance(inner_output, tuple) else moved

        running, handle = True, inner.register_forward_hook(move)
        try:
            plain, moved = _states(output), _states(block(*args, **kwargs))
        finally:
            handle.remove()
            running = False
        change = (moved - plain).norm(dim=-1)
        sizes.append((_size(plain) * moves[0].norm() / change).flatten().cpu())

    return hook


def _block_around(model: nn.Module, name: str) -> nn.Module | None:
    """The decoder block that is or contains a module; None if the blocks cannot be found."""
    try:
        blocks = find_blocks(model)
    except ValueError:
        return None
    return next((block for prefix, block in blocks if name == prefix or name.startswith(f"{prefix}.")), None)
