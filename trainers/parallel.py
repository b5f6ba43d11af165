"""Gather the weights that ZeRO-3 shards, while they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 shards a parameter, to which it adds attributes."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a whole parameter: ZeRO-3 leaves an empty tensor in its place, and a DTensor has the full one."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_size(parameter: Tensor) -> int:
    """How many numbers a whole parameter has."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def gathered(parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Context in which parameters have all their values, on every process; all processes must enter it."""
    shards = [p for p in parameters if is_sharded(p)]
    if not shards:
        return nullcontext()
    import deepspeed  # pyright: ignore[reportMissingImports]  # optional

    return deepspeed.zero.GatheredParameters(shards)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Context for forward passes before DeepSpeed takes over the model; afterwards it gathers weights itself."""
    opened: dict[nn.Module, AbstractContextManager[Any]] = {}

    def gather(module: nn.Module, args: Any) -> None:
        opened[module] = gathered(module.parameters(recurse=False))
        opened[module].__enter__()

    def release(module: nn.Module, args: Any, output: Any) -> None:
        opened.pop(module).__exit__(None, None, None)

    with ExitStack() as stack:
        for module in model.modules():
            if any(is_sharded(p) for p in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(gather, prepend=True).remove)
                stack.callback(module.register_forward_hook(release).remove)
        yield
