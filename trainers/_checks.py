"""What a trainer refuses before anything is trained: arguments that contradict each other, or change nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftConfig
from torch import nn

from ..adapters import steering_layers
from ..adapters.blocks import find_blocks, resolve_layers
from ..losses import Loss, parts
from ._at import scaled
from ._data import DataError
from .prefix.cut import base_of, lowest_changed
from .views import View, ViewError


def check_own(peft_config: Any, views: Any, biases: Any) -> None:
    """Raise a TypeError for an argument of our own that is of another type."""
    wrong = {
        f"peft_config={peft_config!r:.100}: a PeftConfig such as SteeringVectorConfig(), or None": (
            isinstance(peft_config, PeftConfig | None)
        ),
        f"views={views!r:.100}: a table of names and views, or None": isinstance(views, Mapping | None),
        f"biases={biases!r:.100}: a table of names and options, or a list": (
            isinstance(biases, Mapping | Sequence) and not isinstance(biases, str)
        ),
    }
    for what, right in wrong.items():
        if not right:
            raise TypeError(f"{what} is expected.")


def check_arguments(loss: Loss, args: Any) -> None:
    """Raise a ValueError when the arguments ask for something of TRL's own loss, which is not used."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)} if args is not None else {}
    for name in ("beta", "loss_type") if "beta" in defaults else ():  # SFTConfig's types are kinds of cross-entropy
        value = getattr(args, name, None)
        # DPOConfig turns its default loss type into a list
        used = getattr(parts(loss)[-1], name, None)  # of the loss itself, whatever is around it
        unset = value in (defaults.get(name), [defaults.get(name)], ["sigmoid"])
        if name in defaults and not unset and value != used:
            raise ValueError(
                f"{type(args).__name__}.{name}={value!r} belongs to TRL's own loss; {loss} does not use it. Give a "
                "loss object (get_loss(name, beta=...)), or leave loss out."
            )


def check_layers(loss: Loss | None, model: nn.Module) -> None:
    """Raise a ValueError when a loss looks at hidden states below all that is trained, which nothing changes."""
    base: Any = base_of(model)
    looking = [part for part in parts(loss) if hasattr(part, "layers")] if loss is not None and loss.states else []
    if not looking or any(p.requires_grad for p in base.get_input_embeddings().parameters()):
        return
    lowest = lowest_changed(model, training=True)
    for part in looking if lowest is not None else []:
        found = resolve_layers(vars(part)["layers"], len(find_blocks(base)))
        if lowest is not None and max(found) < lowest:
            raise ValueError(
                f"{type(part).__name__} looks at the states of layers {found}, and the lowest layer that is trained "
                f"is {lowest}: it would change nothing. Name a layer from there on (layers=, or cap_layers=)."
            )


def check_reference(loss: Loss | None, config: PeftConfig | None) -> None:
    """Raise a ValueError when an adapter changes the base model itself, which then is no reference any more."""
    bias = getattr(config, "bias", "none")
    if loss is not None and loss.reference and isinstance(bias, str) and bias != "none":
        raise ValueError(
            f"{type(config).__name__}(bias={bias!r}) trains biases of the base model, which stay when the adapter is "
            f"switched off: the reference of {type(loss).__name__} would move along. Set bias='none'."
        )


def check_strengths(loss: Loss, model: nn.Module) -> None:
    """Raise a ValueError for a strength that the loss may ask for and the adapter does not have."""
    for strength in loss.strengths:
        with scaled(model, strength):
            pass


def check_views(loss: Loss | None, views: Mapping[str, str | View] | None) -> None:
    """Raise a ViewError when the loss asks for views that nobody gave."""
    needed = () if loss is None else loss.views
    if missing := [name for name in needed if name not in (views or {})]:
        raise ViewError(f"{type(loss).__name__} compares with the views {list(needed)}; {missing} are not in views=.")


def check_teacher(name: str, teacher: nn.Module, model: nn.Module) -> None:
    """Raise a ViewError for a teacher that cannot be compared with the model, or that is this model itself."""
    theirs, ours = (base_of(each) for each in (teacher, model))
    if theirs is ours:
        raise ViewError(f"View {name!r}: its teacher is the trained model itself. Give share_weights(model), adapted.")
    bases: list[Any] = [theirs, ours]
    sizes = [each.get_input_embeddings().weight.shape for each in bases]
    if sizes[0] != sizes[1]:
        raise ViewError(f"View {name!r}: its teacher's (tokens, width) are {[*sizes[0]]}, the model's {[*sizes[1]]}.")


def check_packing(model: nn.Module, dataset: Any) -> None:
    """Raise a DataError when packed rows, which hold several prompts, meet vectors that depend on where one ends."""
    packed = "seq_lengths" in (getattr(dataset, "column_names", None) or [])
    for config in (config for layer in steering_layers(model) for config in layer.config.values()):
        if packed and config.positions != "all":
            raise DataError(f"positions={config.positions!r} needs one prompt in a row. Set packing=False.")
