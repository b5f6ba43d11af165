"""How many decoder blocks are below everything that training changes, and why a memo of them would be wrong."""

from __future__ import annotations

from collections.abc import Iterable

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ...adapters import SteeringVectorLayer
from ...adapters.blocks import find_blocks

_ADAPTERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


class NoPrefix(ValueError):
    """There is nothing frozen below what is trained, or it cannot be memoised; the message says why."""


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def frozen_blocks(model: nn.Module, training: bool) -> int:
    """Number of decoder blocks whose outputs neither an adapter nor, in training, a trained parameter changes.

    A steering vector on the output of block `i` leaves that block itself as it was: `i + 1` blocks are frozen.

    Raises:
        NoPrefix: there is none.
    """
    try:
        blocks = find_blocks(base_of(model))
    except ValueError as error:
        raise NoPrefix(str(error)) from error
    i = lowest_changed(model, training)
    if i is None:
        return len(blocks)
    name, block = blocks[i]
    inside, _ = _changes(block, training)
    if inside and i == 0:
        raise NoPrefix(
            f"the lowest layer that is trained or adapted is 0 ({name}): nothing lies below it. Train higher layers "
            "(layers=) to leave some out"
        )
    return i if inside else i + 1


def lowest_changed(model: nn.Module, training: bool) -> int | None:
    """The lowest decoder block whose output an adapter or, in training, a trained parameter changes; None: no block's.

    Raises:
        ValueError: the model's blocks are unknown.
    """
    for i, (_, block) in enumerate(find_blocks(base_of(model))):
        if any(_changes(block, training)):
            return i
    return None


def _changes(block: nn.Module, training: bool) -> tuple[bool, bool]:
    """Whether something changes what a block computes, and whether something is added to its output."""
    inside, after, owned = False, False, set()
    for module in block.modules():
        if isinstance(module, _ADAPTERS):
            if isinstance(module, SteeringVectorLayer) and module in block.children():
                after = True
                owned |= {id(p) for p in module.parameters()}
            else:
                inside = True
    trained = training and any(p.requires_grad and id(p) not in owned for p in block.parameters())
    return inside or trained, after


def check_frozen(modules: Iterable[tuple[str, nn.Module]], training: bool, random: bool) -> None:
    """Refuse modules below the cut that are trained, adapted, random, sharded or elsewhere.

    Args:
        modules: Names and modules that a forward pass ran before it reached the cut.
        training: Whether parameters that require gradients will change.
        random: Whether dropout will be at work.

    Raises:
        NoPrefix: names the module and what is wrong with it.
    """
    for name, module in modules:
        if isinstance(module, _ADAPTERS):
            raise NoPrefix(f"{name} below the trained layers has an adapter")
        if random and (rate := dropout(module)):
            raise NoPrefix(f"{name}.{rate} below the trained layers makes its output random. Set it to 0")
        for key, parameter in module.named_parameters(recurse=False):
            if training and parameter.requires_grad:
                raise NoPrefix(f"{name}.{key} below the trained layers is trained. Freeze it, or train an adapter")
            if parameter.is_meta or hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh"):
                raise NoPrefix(f"{name}.{key} is sharded or offloaded: all processes must run the same layers")


def dropout(module: nn.Module) -> str | None:
    """The module's own dropout rate above 0, as `name=value`, if it has one (layer drop too)."""
    own = vars(module)
    rates = {key: value for key, value in own.items() if "drop" in key}
    if "drop" in type(module).__name__.lower():
        rates["p"] = own.get("p")
    return next((f"{key}={value}" for key, value in rates.items() if isinstance(value, float) and value > 0), None)
