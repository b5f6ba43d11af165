"""Learning rates that mean the same on every model: optimisers see a steering vector in units of the residual stream.

How far a vector has to move depends on the size of the stream that it is added to, which differs between models,
layers and sites by orders of magnitude: about 120 at two thirds of SmolLM2-135M, 2,500 there in Gemma-3-270M. So an
optimiser works on `u = v / unit`, where

    v: unit = 64 · size / (√d · layers)     written:  a step of 1e-3 moves the vector by at most 6.4 % of the stream
    w: unit = 32 / (√d · size)              read:     ... the gate w·h by 3.2 %
    b: unit = 32                            offset:   ... and b by as much

`size` is the typical size of the stream where the vector is written (`adapters/stream.py`), kept in the adapter's
configuration, d its width, and `layers` the number of layers that share the move. A step of AdamW changes every
entry of u by about the learning rate, so rates that suit a LoRA (1e-4 to 1e-3) suit a vector.

The parameter itself always holds the vector v in absolute units, as people, files and other tools expect. Only inside
`optimizer.step()` is it divided by its unit, by two hooks that PyTorch offers for all optimisers. Its gradient is
always dL/du, so that clipping does not depend on the stream either. So a rate means the same for every optimiser (a
step of SGD on v would scale with size²), with weight decay, with clipping and in every Trainer. Two alternatives are
worse. Parameter groups with another rate have no effect in stock trainers, and do not fix SGD, weight decay or
clipping. A parameter that holds u breaks everything that reads or writes vectors, and files saved under ZeRO-3, where
weights do not pass through `state_dict`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

STEP_SHARE = 64.0
"""The largest move of a vector in a step of AdamW with learning rate 1, as a share of the stream's size."""
_STEP_GATE = 32.0  # the largest move of a gate
UNIT = "steering_unit"
"""Key of a parameter group: the unit of all its parameters. DeepSpeed flattens the parameters of a group, so only the
group can carry the unit."""


class HasUnit(Protocol):
    """A module with one parameter, `weight`, that optimisers see in units."""

    weight: Any
    unit: float | None


_live: weakref.WeakSet[Any] = weakref.WeakSet()
_stepping: dict[int, list[tuple[Tensor, Tensor, Tensor, float]]] = {}  # id of an optimiser -> (p, v, u, unit)
_in_units: dict[int, float] = {}  # id of a parameter -> its unit, while some optimiser steps


def unit_of(kind: str, size: float, width: int, layers: int) -> float:
    """The unit of a parameter of a steering vector.

    Args:
        kind: `v`, `w` or `b`.
        size: Typical size of the residual stream where the vector is written.
        width: The width d of the stream.
        layers: The number of layers that the adapter steers.
    """
    if kind == "b":
        return _STEP_GATE
    if kind == "w":
        return _STEP_GATE / (math.sqrt(width) * size)
    return STEP_SHARE * size / (math.sqrt(width) * layers)


def length_unit(size: float, layers: int) -> float:
    """The unit of a vector's length: a step of 1e-3 moves the vector by 3.2 % of the stream, as for its entries."""
    return STEP_SHARE * size / layers


def track(module: HasUnit) -> None:
    """Make optimisers see the parameter of `module` in its unit."""
    _live.add(module)


def value(module: HasUnit) -> Tensor:
    """The parameter of a module for the forward pass: its value is v, and its gradient that of u."""
    weight = module.weight
    if (unit := _in_units.get(id(weight))) is not None:  # a closure runs the model inside the step
        return weight * unit
    if module.unit is None or not torch.is_grad_enabled():
        return weight
    held = weight.detach()
    # The difference is exactly 0: the value stays v, and only the gradient is multiplied.
    return held + (weight - held) * module.unit


def _parameters_in_units(optimizer: Optimizer, closure: bool) -> Iterator[tuple[Tensor, float]]:
    """The parameters with a unit that this step moves, and their units.

    Args:
        optimizer: The optimiser that is about to step.
        closure: Whether it computes the gradients itself.
    """
    units = {id(module.weight): module.unit for module in _live if module.unit is not None}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            unit = units.get(id(parameter), group.get(UNIT))
            if unit is not None and (closure or parameter.grad is not None):
                yield parameter, unit


@torch.no_grad()
def _divide(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step: `u = v / unit`."""
    if id(optimizer) in _stepping:
        return
    # args[0] is the optimiser; accelerate passes closure=None as a positional argument.
    moved, closure = [], (args[1] if len(args) > 1 else kwargs.get("closure")) is not None
    for parameter, unit in _parameters_in_units(optimizer, closure):
        if id(parameter) in _in_units:  # already divided by an optimiser that wraps this one
            continue
        _refuse_averaging(optimizer)
        before = parameter.detach().clone()
        parameter.div_(unit)
        moved.append((parameter, before, parameter.detach().clone(), unit))
        _in_units[id(parameter)] = unit
    if moved:
        _stepping[id(optimizer)] = moved


@torch.no_grad()
def _multiply(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """After a step: `v + unit · Δu`, so that entries that did not move keep their exact bits."""
    for parameter, before, u, unit in _stepping.pop(id(optimizer), ()):
        parameter.copy_(before + (parameter - u) * unit)
        _in_units.pop(id(parameter), None)


def _refuse_averaging(optimizer: Optimizer) -> None:
    """Refuse schedule-free optimisers: they average parameters outside of steps, which would mix u with v."""
    if callable(getattr(optimizer, "eval", None)):
        raise ValueError(
            f"{type(optimizer).__name__} averages parameters outside of its steps, but steering vectors are in "
            "units of the residual stream only during a step. Use another optimizer (optim='adamw_torch'), or set "
            "stream_sizes={} in the SteeringVectorConfig for absolute learning rates."
        )


register_optimizer_step_pre_hook(_divide)
register_optimizer_step_post_hook(_multiply)
