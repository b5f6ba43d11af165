"""Weights that ZeRO-3 keeps in shares: whole again for as long as somebody looks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn


def gathered(parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Context in which parameters have all their values, on every process; all processes must enter it."""
    shared = [p for p in parameters if hasattr(p, "ds_id")]
    if not shared:
        return nullcontext()
    import deepspeed  # pyright: ignore[reportMissingImports]  # optional

    return deepspeed.zero.GatheredParameters(shared)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Context for forward passes before DeepSpeed has taken the model over, which gathers weights by itself then."""
    opened: dict[nn.Module, AbstractContextManager[Any]] = {}

    def gather(module: nn.Module, args: Any) -> None:
        opened[module] = gathered(module.parameters(recurse=False))
        opened[module].__enter__()

    def release(module: nn.Module, args: Any, output: Any) -> None:
        opened.pop(module).__exit__(None, None, None)

    with ExitStack() as stack:
        for module in model.modules():
            if any(hasattr(p, "ds_id") for p in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(gather, prepend=True).remove)
                stack.callback(module.register_forward_hook(release).remove)
        yield
