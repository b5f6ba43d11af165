"""Find constant vectors that are baked into a checkpoint, and remove them.

A vector that is added at every token can be hidden in the bias of a layer that writes into the residual stream, and
stock tools load it as part of the model. Every bias inside the blocks is tested: the block runs once with the whole
bias, and once without what may have been added to it. If its output moves by the same vector at every token, the bias
adds that vector to the residual stream, whatever the layer is called. A bias whose effect depends on the state, such
as a query bias, fails this test.

If a base model is given, the difference from it is what was added. Otherwise a bias is suspected if the same bias is
zero in most blocks, or if it is far longer than in the other blocks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import find_blocks, site_name
from ..observing import evaluating
from ..outputs import states_in
from ..types import Site

_CONSTANT = 1e-3  # share of the change's length by which it may vary between tokens
_DIFFERENT = 1e-5  # share of a parameter's length; rounding stays below it
_OUTLIER = 8.0  # median absolute deviations
_TOKENS = 4


@dataclass(frozen=True)
class Constant:
    """A constant vector that a checkpoint adds to the residual stream.

    Attributes:
        parameter: The bias that adds it.
        layer: Index of the block.
        site: "block" if the output of the whole block moves by it, "attention" if only that of its attention does.
        vector: The vector that is added to the residual stream, `(d,)` in fp32.
        added: What was added to the bias; not the whole bias if the architecture already has one.
        why: What distinguishes it from the model's own biases.
        certain: True if a base model, or zeros in the other blocks, prove it; False if it is only an outlier.
    """

    parameter: str
    layer: int
    site: Site
    vector: Tensor
    added: Tensor
    why: str
    certain: bool


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        constants: The constant vectors.
        changed: All other parameters that differ from the base model's, with the size of the difference as a share of
            the parameter's (1: the base model has no such parameter); empty without a base model.
    """

    constants: list[Constant]
    changed: dict[str, float]


@torch.no_grad()
def audit(model: nn.Module, base: nn.Module | None = None) -> Audit:
    """Look for constant vectors in the weights of a model; see the module's docstring.

    Args:
        model: The checkpoint, without adapters.
        base: The model that it may have been made from.

    Raises:
        ValueError: the base model has other blocks.
    """
    blocks = find_blocks(model)
    suspects = _beside(blocks, model, base) if base is not None else _among(blocks)
    constants = []
    with evaluating(model):
        calls = _calls(model, [module for _, module in blocks])
        for layer, ((name, block), call) in enumerate(zip(blocks, calls, strict=True)):
            for parameter, added, why, certain in suspects.get(name, []):
                moved = _moved(name, block, call, parameter, added)
                if moved is not None:
                    constants.append(Constant(f"{name}.{parameter}", layer, *moved, added, why, certain))
    changed = {} if base is None else _differences(model, base)
    return Audit(constants, {name: d for name, d in changed.items() if name not in {c.parameter for c in constants}})


def without(model: nn.Module, constants: list[Constant]) -> None:
    """Remove constant vectors from the biases that add them, in place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for constant in constants:
            parameter = parameters[constant.parameter]
            parameter.copy_((parameter.float() - constant.added.to(parameter.device)).to(parameter.dtype))


Suspect = tuple[str, Tensor, str, bool]
"""A bias in its block, what may have been added to it, why, and whether that is certain."""


def _beside(blocks: list[tuple[str, nn.Module]], model: nn.Module, base: nn.Module) -> dict[str, list[Suspect]]:
    """Biases that differ from those of a base model."""
    parameters = dict(base.named_parameters())
    if [name for name, _ in find_blocks(base)] != [name for name, _ in blocks]:
        raise ValueError(
            f"The base model has other blocks than the checkpoint ({len(blocks)} blocks, the first is "
            f"{blocks[0][0]}). Give the base model that the checkpoint was made from."
        )
    suspects: dict[str, list[Suspect]] = defaultdict(list)
    for name, block in blocks:
        for path, bias in _biases(block):
            base_bias = parameters.get(f"{name}.{path}")
            if base_bias is not None and base_bias.shape != bias.shape:
                continue
            added = bias.float() - (0.0 if base_bias is None else base_bias.float())
            if base_bias is None and bool(added.any()):
                suspects[name].append((path, added, "the base model has no such bias", True))
            elif base_bias is not None and _relative(base_bias, bias) > _DIFFERENT:
                suspects[name].append((path, added, "it differs from the base model's", True))
    return suspects


def _among(blocks: list[tuple[str, nn.Module]]) -> dict[str, list[Suspect]]:
    """Biases that are unlike the same bias of the other blocks."""
    kinds: dict[str, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, block in blocks:
        for path, bias in _biases(block):
            kinds[path].append((name, bias.float()))
    suspects: dict[str, list[Suspect]] = defaultdict(list)
    for path, rows in kinds.items():
        lengths = torch.stack([bias.norm() for _, bias in rows])
        nonzero = lengths > 0
        if 0 < int(nonzero.sum()) <= len(rows) // 2:
            why = f"this bias is zero in {len(rows) - int(nonzero.sum())} of {len(rows)} blocks"
            for (name, bias), is_nonzero in zip(rows, nonzero.tolist(), strict=True):
                if is_nonzero:
                    suspects[name].append((path, bias, why, True))
        elif len(rows) > 4:
            median = lengths.median()
            spread = (lengths - median).abs().median().clamp_min(1e-3 * float(median))
            usual = torch.stack([bias for _, bias in rows]).median(dim=0).values
            for (name, bias), far in zip(rows, ((lengths - median) / spread > _OUTLIER).tolist(), strict=True):
                if far:
                    why = "it is far longer than this bias is in the other blocks"
                    suspects[name].append((path, bias - usual, why, False))
    return suspects


def _biases(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, parameter in block.named_parameters():
        if parameter.ndim == 1 and re.search(r"(^|[._])bias$", path):
            yield path, parameter.detach()


def _moved(name: str, block: nn.Module, call: tuple[Any, ...], path: str, added: Tensor) -> tuple[Site, Tensor] | None:
    """The site where a bias adds a constant vector, and the vector; None if its effect depends on the state."""
    sites: list[Site] = ["block", "attention"]
    for site in sites:
        try:
            inner = site_name(name, block, site).removeprefix(name).removeprefix(".")
        except ValueError:  # the block has no attention module that can be identified
            continue
        change_TD = _change(block, inner, call, path, added)
        if change_TD is None:
            continue
        mean_D = change_TD.mean(dim=0)
        off = (change_TD - mean_D).norm(dim=-1).max()
        if mean_D.norm() > 0 and off <= _tolerance(block) * mean_D.norm():
            return site, mean_D
    return None


def _tolerance(block: nn.Module) -> float:
    """The share by which a constant may vary between tokens; in half precision, rounding of the states adds to it."""
    dtype = next(block.parameters()).dtype
    return _CONSTANT if dtype == torch.float32 else 0.1


def _change(block: nn.Module, inner: str, call: tuple[Any, ...], path: str, added: Tensor) -> Tensor | None:
    """How the output of a part of a block moves by what was added to a bias, `(tokens, d)`."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(states_in(output).detach().float())

    parameter = dict(block.named_parameters())[path]
    saved = parameter.detach().clone()
    handle = block.get_submodule(inner).register_forward_hook(keep)
    args, kwargs = call
    try:
        block(*args, **kwargs)
        parameter.copy_((saved.float() - added).to(saved.dtype))
        block(*args, **kwargs)
    finally:
        parameter.copy_(saved)
        handle.remove()
    if len(outputs) != 2:
        return None
    with_it, without_it = outputs
    return (with_it - without_it).reshape(-1, with_it.shape[-1])


def _calls(model: nn.Module, blocks: list[nn.Module]) -> list[tuple[Any, ...]]:
    """The arguments that every block is called with, on a few tokens."""
    calls: dict[nn.Module, tuple[Any, ...]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] = (args, kwargs)

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    try:
        tokens = torch.arange(3, 3 + _TOKENS, device=next(model.parameters()).device)[None]
        model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [calls[block] for block in blocks]


def _differences(model: nn.Module, base: nn.Module) -> dict[str, float]:
    """Parameters that differ from the base model's, and by what share of their length; 1 for new ones."""
    base_parameters = dict(base.named_parameters())
    changed = {}
    for name, parameter in model.named_parameters():
        unchanged = base_parameters.get(name)
        if unchanged is None or unchanged.shape != parameter.shape:
            if unchanged is not None or bool(parameter.any()):
                changed[name] = 1.0
        elif (share := _relative(unchanged, parameter)) > _DIFFERENT:
            changed[name] = share
    return changed


def _relative(old: Tensor, new: Tensor) -> float:
    return float((new.detach().float() - old.detach().float()).norm() / old.detach().float().norm().clamp_min(1e-12))
