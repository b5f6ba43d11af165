"""The learning rate of steering vectors: which one it is, and that optimisers use it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..adapters import SteeringVectorConfig, SteeringVectorModel, steering_layers, units
from ._resume import CheckpointError
from ._saved import adapter_folder

if TYPE_CHECKING:
    from ._mixin import SteeringMixin

DEFAULT_RATE = 1e-3
"""In units of the residual stream (`adapters/units.py`); chosen in `docs/results/learning_rates/`."""
_HARDLY_MOVES = 0.02  # of the stream's size, over the whole training
_BLOWS_UP = 0.25  # of the stream's size, in one step
_OUTSIDE = ("lomo", "layerwise", "schedule_free")  # step in the backward pass, or average between steps
_ADAPTIVE = ("adam", "lion", "adagrad", "adadelta", "rmsprop", "ademamix", "sign")


@dataclass(frozen=True)
class VectorRate:
    """A learning rate of vectors.

    Attributes:
        value: In units of the residual stream.
        reason: Why it is this one, in words.
    """

    value: float
    reason: str


def vector_rate(args: Any, given: float | None) -> VectorRate:
    """The rate of steering vectors: `vector_learning_rate=` if it is given, `learning_rate` if it is not its class's
    default, and else our own, because the defaults of full finetuning (1e-6 for DPO) leave a vector where it is.

    Args:
        args: The training arguments.
        given: The trainer's `vector_learning_rate`.
    """
    if given is not None:
        return VectorRate(given, "vector_learning_rate")
    kind = type(args).__name__
    default = next(field.default for field in dataclasses.fields(args) if field.name == "learning_rate")
    if args.learning_rate != default:
        return VectorRate(args.learning_rate, f"{kind}.learning_rate")
    return VectorRate(DEFAULT_RATE, f"the default for vectors; {kind}.learning_rate is left at its own, {default:g}")


def check_rate(given: float | None) -> None:
    """Raise a ValueError unless a `vector_learning_rate` is a finite number above 0, or None."""
    number = isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given) and given > 0
    if given is not None and not number:
        raise ValueError(
            f"vector_learning_rate={given!r} must be a finite number above 0, such as 1e-3. None leaves it to "
            "learning_rate."
        )


def check_optimizer(args: Any, vectors: Mapping[int, float | None], given: bool, rate: float | None) -> None:
    """Raise a ValueError for an optimiser that would not step vectors in their units, or not at their rate.

    Args:
        args: The training arguments.
        vectors: See `trained_vectors`.
        given: Whether the user made the optimiser.
        rate: The trainer's `vector_learning_rate`.
    """
    if given and rate is not None:
        raise ValueError(
            f"vector_learning_rate={rate:g} and an optimizer of your own: set the rate of the vectors' parameter "
            "group, or leave optimizers= out."
        )
    kind = str(getattr(args.optim, "value", args.optim))
    if not given and any(name in kind for name in _OUTSIDE) and any(unit is not None for unit in vectors.values()):
        raise ValueError(
            f"optim={kind!r} changes parameters outside of optimizer.step(), and steering vectors are in units of the "
            "residual stream only inside. Use another (optim='adamw_torch'), or absolute learning rates: "
            "SteeringVectorConfig(stream_sizes={})."
        )


def trained_vectors(model: nn.Module) -> dict[int, float | None]:
    """The parameters of steering vectors that are trained: id -> unit, None for one in absolute units."""
    return {
        id(vector.weight): vector.unit
        for layer in steering_layers(model)
        for kind in layer.adapter_layer_names
        for vector in getattr(layer, kind).values()
        if vector.weight.requires_grad
    }


def group_vectors(optimizer: Optimizer, model: nn.Module, rate: float) -> None:
    """Give the vectors in an optimiser their rate, in parameter groups of their own, one for each unit.

    Args:
        optimizer: Just made: no scheduler knows its groups yet.
        model: Whose vectors are trained.
        rate: In units.
    """
    vectors = trained_vectors(model)
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        by_unit: dict[float | None, list[Any]] = {}
        for parameter in group["params"]:
            if id(parameter) in vectors:
                by_unit.setdefault(vectors[id(parameter)], []).append(parameter)
        others = [parameter for parameter in group["params"] if id(parameter) not in vectors]
        options = {name: value for name, value in group.items() if name != "params"}
        for unit, parameters in by_unit.items():
            own = {} if unit is None else {units.UNIT: unit}
            optimizer.add_param_group({**options, **own, "params": parameters, "lr": rate})
        if others:
            optimizer.add_param_group({**options, "params": others})


def agree_on_units(trainer: SteeringMixin) -> None:
    """Measure the stream for vectors that have no unit yet (weights were sharded, or on the meta device, when they
    were made), and take the main process's units on all."""
    model: Any = trainer.model
    if not isinstance(model, PeftModel):
        return
    for name, config in model.peft_config.items():
        if not isinstance(config, SteeringVectorConfig) or config.inference_mode:
            continue
        tuner: Any = model.base_model
        sizes = broadcast_object_list([config.stream_sizes])[0]  # so that all processes measure, or none
        if sizes is None or sizes != config.stream_sizes:
            tuner.set_stream_sizes(name, sizes)


def take_units_of(folder: str, model: nn.Module) -> None:
    """Go on in the units of a checkpoint.

    Raises:
        CheckpointError: it was trained with absolute learning rates, which mean something else now.
    """
    if not isinstance(model, PeftModel):
        return
    name = str(model.active_adapter)
    config, tuner = model.peft_config[name], model.base_model
    if not isinstance(config, SteeringVectorConfig) or not isinstance(tuner, SteeringVectorModel):
        return
    file = adapter_folder(model, Path(folder)) / CONFIG_NAME
    sizes = SteeringVectorConfig.from_json_file(str(file)).get("stream_sizes")
    if sizes is None and config.stream_sizes:
        raise CheckpointError(
            f"{folder} was trained with an absolute learning rate; rates are in units of the residual stream now, so "
            "its schedule and optimizer state cannot go on. Train on from its vector instead: "
            "PeftModel.from_pretrained(model, folder, is_trainable=True)."
        )
    if sizes != config.stream_sizes:
        tuner.set_stream_sizes(name, sizes or {})


def largest_share(optimizer: Optimizer, scheduler: Any, steps: int, rate: float) -> float | None:
    """By which share of the stream's size `steps` steps can move the vectors, if all of them point one way.

    None where the optimiser's steps do not have the size of the learning rate, as those of SGD do not.
    """
    if not any(name in type(_innermost(optimizer)).__name__.lower() for name in _ADAPTIVE):
        return None
    inner = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    factors = [1.0] * steps
    if isinstance(inner, LambdaLR) and None not in inner.lr_lambdas:
        factors = [float(inner.lr_lambdas[0](step)) for step in range(steps)]
    return units.STEP_SHARE * rate * sum(factors)


def warning_of(rate: float, steps: int, share: float) -> str | None:
    """What is wrong with a rate that cannot move a vector, or must blow it up; None where nothing is."""
    if share < _HARDLY_MOVES:
        return (
            f"this cannot change much: {steps} steps move the vector by at most {share:.2%} of the residual stream. "
            f"Set learning_rate or vector_learning_rate to about {DEFAULT_RATE:g}, or train longer."
        )
    if units.STEP_SHARE * rate > _BLOWS_UP:
        return (
            f"every step moves the vector by up to {units.STEP_SHARE * rate:.0%} of the residual stream, which "
            "usually destroys the model's text. Rates of vectors are in units of the stream (absolute ones, as in "
            f"version 0.1, were about 300 times as large): set it to about {DEFAULT_RATE:g}."
        )
    return None


def mark_deepspeeds_optimizer(trainer: SteeringMixin, optimizer: Any) -> None:
    """Tell an optimiser that DeepSpeed has made from its own configuration which unit the vectors have: it has put all
    parameters into one flat one.

    Raises:
        ValueError: they have several units, something else is trained, or another rate is asked for than it has.
    """
    vectors = trained_vectors(trainer.model)
    others = [name for name, p in trainer.model.named_parameters() if p.requires_grad and id(p) not in vectors]
    rate = vector_rate(trainer.args, trainer.vector_learning_rate)
    unit, *more = set(vectors.values())
    advice = "Take 'optimizer' out of DeepSpeed's configuration: the Trainer then makes one that DeepSpeed wraps."
    if others or more:
        what = f"{others[0]} is trained too" if others else f"the vectors have {1 + len(more)} units"
        raise ValueError(f"DeepSpeed's optimizer sees all parameters as one, in one unit, and {what}. {advice}")
    if rate.value != trainer.args.learning_rate:
        raise ValueError(
            f"DeepSpeed's optimizer has learning_rate={trainer.args.learning_rate:g}, and the vectors have "
            f"{rate.value:g} ({rate.reason}). Set learning_rate={rate.value:g}. {advice}"
        )
    for group in _innermost(optimizer).param_groups:
        group[units.UNIT] = unit


def _innermost(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrappers
        optimizer = optimizer.optimizer
    return optimizer
