"""Find out, by measurement, where a model's weights can hold a constant that a hook would otherwise add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..layer import SteeringVectorLayer
from ..observing import evaluating, untouched
from ..outputs import states_in
from ._vectors import ConstantVectors, ExportError

_EXACT = 1e-4  # of the vector's length, in fp32
_TOKENS = 4


def linear_places(
    vectors: ConstantVectors, model: PeftModel, fits: Callable[[nn.Module], bool]
) -> dict[str, tuple[str, Tensor]]:
    """Find a linear map inside each steered module where adding a constant has the same effect.

    The vector is added to the output of each candidate in turn, from the last to the first, and the change of the
    steered module's output is measured. If it is the vector (or a fixed multiple of it, which is divided out), the
    place is exact. Blocks that normalise or scale after their last map have no such place, nor do fused experts.

    Args:
        vectors: The vectors.
        model: The steered model.
        fits: Tells which modules can hold a constant.

    Returns:
        Name of the steered module -> (name of the linear map, what is added to its output).

    Raises:
        ExportError: a steered module has no such place.
    """
    base = model.get_base_model()
    with untouched(model), model.disable_adapter(), evaluating(base), torch.no_grad():
        calls = _calls(base, list(vectors.vectors))
        return {
            name: _place(name, base.get_submodule(name), *calls[name], vector, fits)
            for name, vector in vectors.vectors.items()
        }


def _calls(base: nn.Module, names: list[str]) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments that the steered modules are called with, on a few tokens."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = (args, kwargs)

        return hook

    handles = [base.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True) for name in names]
    try:
        tokens = torch.arange(3, 3 + _TOKENS, device=next(base.parameters()).device)[None]
        base(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _place(
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    vector: Tensor,
    fits: Callable[[nn.Module], bool],
) -> tuple[str, Tensor]:
    before = states_in(module(*args, **kwargs))
    candidates = [
        (path, inner)
        for path, inner in module.named_modules()
        if path and fits(inner) and not isinstance(inner, SteeringVectorLayer)
    ]
    rejected = []
    for path, inner in reversed(candidates):
        handle = inner.register_forward_hook(_adding(vector))
        try:
            change = (states_in(module(*args, **kwargs)) - before).float().cpu()
        except RuntimeError:  # a map of another width
            continue
        finally:
            handle.remove()
        # The multiple of the vector that arrives at the output, and the largest deviation from it.
        share = float((change * vector).sum() / (vector.square().sum() * change[..., 0].numel()))
        off = float((change - share * vector).abs().max() / vector.abs().max())
        if abs(share) > 1e-3 and off <= _tolerance(before) * max(1.0, abs(share)):
            return f"{name}.{path}", vector / (1.0 if abs(share - 1) <= _tolerance(before) else share)
        rejected.append(f"{path} (gives {share:.2g} of it, off by {off:.2g})")
    reasons = ", ".join(rejected[:3]) or "it has no linear map of this width"
    raise ExportError(
        f"No map inside {name} ({type(module).__name__}) can hold the vector: {reasons}. The block normalises after "
        "its last map, or has fused experts. What works: the steering adapter itself, safetensors, gguf."
    )


def _tolerance(states: Tensor) -> float:
    """The relative error allowed: a vector added to a state is rounded to the precision of the states."""
    return max(_EXACT, 64 * torch.finfo(states.dtype).eps * (1.0 + float(states.float().abs().max())))


def _adding(vector: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return (output + vector.to(output.device)).to(output.dtype)

    return hook
