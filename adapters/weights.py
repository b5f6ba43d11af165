"""A sample of a base model's weights: two numbers of every matrix and vector of every block, and some of the rest.

Fingerprints compare this sample. It has a few hundred numbers, whatever the size of the model. Weights that cannot be
read cheaply (sharded, on the meta device, quantised by another method than bitsandbytes, or packed for a CPU's
kernels) are left out.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers import PreTrainedModel

PER_BLOCK = 2  # numbers of one parameter of one block
ELSEWHERE = 16  # numbers of one parameter outside the blocks
MOST_PATTERNS = 64  # mixtures of experts have thousands of matrices in a block
EXACT_TOLERANCE = 1e-5
"""The share of their length by which exact weights may differ: nine digits of them are saved."""
QUANTISED_TOLERANCE = 0.3
"""The same if one of the models is quantised: 4 bits change a weight by a tenth of a typical one."""
_MISSING = "?"
_GOLDEN = 0.6180339887498949  # its multiples modulo 1 are spread evenly, however many there are
_QUANTISED = ("Params4bit", "Int8Params")
_EXACT = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LOW_ROWS = 32  # rows of an output layer that a resized vocabulary keeps


def sample_weights(model: nn.Module) -> dict[str, Any]:
    """`{"values": {pattern: numbers}, "quantised": [pattern, ...]}`.

    A pattern is the name of a parameter with `*` for the block. Its numbers are one string, which keeps configuration
    files short; `?` stands for a number that could not be read.
    """
    embedding = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    groups: dict[str, list[tuple[nn.Module, str]]] = defaultdict(list)
    for name, module, parameter in base_parameters(model):
        if module is not embedding:
            groups[re.sub(r"\.\d+\.", ".*.", name, count=1)].append((module, parameter))
    patterns = sorted(groups)
    patterns = patterns[:: -(-len(patterns) // MOST_PATTERNS)] if patterns else []
    values, quantised = {}, []
    for pattern in patterns:
        count = PER_BLOCK if ".*." in pattern else ELSEWHERE
        numbers, exact = zip(*(_entries(module, name, count) for module, name in groups[pattern]), strict=True)
        values[pattern] = " ".join(
            _MISSING if x is None else f"{x:.9g}" for x in itertools.chain.from_iterable(numbers)
        )
        if not all(exact):
            quantised.append(pattern)
    return {"values": values, "quantised": quantised}


def base_parameters(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, str]]:
    """`(name in the base without adapters, module, name in the module)` of every parameter of the base."""
    if isinstance(model, BaseTunerLayer):
        inner = model._modules.get("base_layer")  # a steering layer has none: it wraps nothing
    elif isinstance(model, AuxiliaryTrainingWrapper):
        inner = model.original_module
    else:
        for name in model._parameters:
            if model._parameters[name] is not None:
                yield prefix + name, model, name
        for name, child in model.named_children():
            yield from base_parameters(child, f"{prefix}{name}.")
        return
    if isinstance(inner, nn.Module):
        yield from base_parameters(inner, prefix)


def _entries(module: nn.Module, name: str, count: int) -> tuple[list[float | None], bool]:
    """Some numbers of a parameter, and whether they are exact: those of a floating-point weight."""
    weight: Any = getattr(module, name)
    if weight.is_meta or weight.numel() == 0 or hasattr(weight, "device_mesh"):  # offloaded, ZeRO-3, sharded
        return [None] * count, True
    exact = type(weight).__name__ not in _QUANTISED and weight.dtype in _EXACT
    whole = weight.detach() if exact else _dequantised(module, weight)
    if whole is None:
        return [None] * count, True
    rows = min(len(whole), _LOW_ROWS) if whole.ndim and count == ELSEWHERE else None
    flat = whole[:rows].reshape(-1) if whole.ndim else whole.reshape(1)
    index = [int((_GOLDEN * (i + 1)) % 1 * flat.numel()) for i in range(count)]
    return flat[torch.tensor(index, device=flat.device)].double().tolist(), exact


def _dequantised(module: Any, weight: Any) -> Tensor | None:
    """A quantised weight in floating point, without changing the module; None if the method is unknown."""
    if type(weight).__name__ == "Params4bit" and weight.quant_state is not None:
        # Some CPU kernels repack a weight in the first inference pass, in a layout that cannot be undone.
        packed = getattr(weight.quant_state, "packing_format_for_cpu", False)
        return None if packed else dequantize_bnb_weight(weight)
    if type(weight).__name__ == "Int8Params":
        scale = module.state.SCB if weight.SCB is None else weight.SCB
        return None if scale is None else weight.detach().float() * scale[:, None] / 127
    return None


def difference_of_weights(expected: dict[str, Any], actual: dict[str, Any]) -> tuple[str, float] | None:
    """The pattern that differs most, and by what share of its length; None if nothing differs.

    Exact weights must be equal up to rounding to half precision between the two. Quantised weights must be close.
    """
    quantised = {*expected["quantised"], *actual["quantised"]}
    worst: tuple[str, float] | None = None
    for pattern in expected["values"].keys() & actual["values"].keys():
        old, new = (_numbers(one["values"][pattern]) for one in (expected, actual))
        if len(old) != len(new):
            return pattern, float("inf")
        both = torch.isfinite(old) & torch.isfinite(new)
        if not both.any():
            continue
        distance = _distance(old[both], new[both])
        if pattern in quantised:
            distance = 0.0 if distance <= QUANTISED_TOLERANCE else distance
        if distance > EXACT_TOLERANCE and (worst is None or distance > worst[1]):
            worst = pattern, distance
    return worst


def _numbers(line: str) -> Tensor:
    return torch.tensor([float("nan") if x == _MISSING else float(x) for x in line.split()]).double()


def _distance(old: Tensor, new: Tensor) -> float:
    """The distance of two samples as a share of the first, after the roundings that explain most of it."""
    gaps = [
        old - new,
        *(rounded - new for rounded in _roundings(old)),
        *(old - rounded for rounded in _roundings(new)),
    ]
    if _is_exact_in(old, torch.bfloat16) and _is_exact_in(new, torch.float16):
        gaps.append(_beyond_two_roundings(old, new))
    elif _is_exact_in(old, torch.float16) and _is_exact_in(new, torch.bfloat16):
        gaps.append(_beyond_two_roundings(new, old))
    return min(float(gap.norm() / old.norm().clamp_min(1e-12)) for gap in gaps)


def _is_exact_in(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether a type represents all values exactly."""
    return torch.equal(values, values.to(dtype).double())


def _beyond_two_roundings(brain: Tensor, half: Tensor) -> Tensor:
    """The part of the gap between a bf16 and an fp16 copy that rounding one weight to both cannot explain."""
    exponent = torch.frexp(brain).exponent.double() - 1
    possible = torch.exp2(exponent - 8) + torch.exp2((exponent - 11).clamp_min(-25))
    return ((brain - half).abs() - possible).clamp_min(0)


def _roundings(values: Tensor) -> list[Tensor]:
    """The values after rounding to bf16, to fp16, or to both in turn."""
    chains = [(torch.bfloat16,), (torch.float16,), (torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)]
    rounded = []
    for chain in chains:
        value = values.float()
        for dtype in chain:
            value = value.to(dtype).float()
        rounded.append(value.double())
    return rounded
