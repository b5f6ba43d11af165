"""The learning rate of steering vectors: how it is chosen, and how optimisers get it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..adapters import SteeringVectorConfig, SteeringVectorModel, steering_layers, units
from .checkpoints import CheckpointError, adapter_folder
from .types import SteeringRun

DEFAULT_RATE = 1e-3
"""In units of the residual stream (`adapters/units.py`); chosen in `docs/results/learning_rates/`."""
_HARDLY_MOVES = 0.04  # of the stream's size, over the whole training
_BLOWS_UP = 0.5  # of the stream's size, in one step
_STEP_OUTSIDE = ("lomo", "layerwise", "schedule_free")  # they step in the backward pass, or average between steps
_ADAPTIVE = ("adam", "lion", "adagrad", "adadelta", "rmsprop", "ademamix", "sign")


@dataclass(frozen=True)
class VectorRate:
    """A learning rate of vectors.

    Attributes:
        value: The rate, in units of the residual stream.
        reason: Why this rate was chosen, in words.
    """

    value: float
    reason: str


def vector_rate(args: Any, given: float | None) -> VectorRate:
    """Choose the rate of steering vectors.

    It is `vector_learning_rate=` if that is given, else `learning_rate` if that is not its class's default, else our
    own: the defaults of full finetuning (1e-6 for DPO) do not move a vector.

    Args:
        args: The training arguments.
        given: The trainer's `vector_learning_rate`.
    """
    if given is not None:
        return VectorRate(given, "vector_learning_rate")
    kind = type(args).__name__
    default = next(field.default for field in dataclasses.fields(args) if field.name == "learning_rate")
    if args.learning_rate != default:
        return VectorRate(args.learning_rate, "learning_rate")
    return VectorRate(DEFAULT_RATE, f"the default for vectors; {kind}.learning_rate is left at its own, {default:g}")


def rate_of_vectors(trainer: SteeringRun, optimizer: Any) -> VectorRate:
    """The learning rate of the trained vectors; an optimiser that the user passed sets its own."""
    if optimizer is None or trainer.vectors_have_groups or trainer.is_deepspeed_enabled:
        return vector_rate(trainer.args, trainer.vector_learning_rate)
    vectors = trained_vectors(trainer.model)
    groups = [group for group in optimizer.param_groups if any(id(p) in vectors for p in group["params"])]
    rate = groups[0].get("initial_lr", groups[0]["lr"]) if groups else 0.0
    return VectorRate(rate, "the optimizer's own")


def describe_rates(trainer: SteeringRun) -> str:
    """The learning rates of a run, for its model card and its errors: `learning rate 0.001`, and that of the other
    parameters if there are any."""
    vectors = trained_vectors(trainer.model)
    if not vectors:
        return f"learning rate {trainer.args.learning_rate:g}"
    words = f"learning rate {rate_of_vectors(trainer, trainer.optimizer).value:g}"
    if any(p.requires_grad and id(p) not in vectors for p in trainer.model.parameters()):
        words += f" for vectors and {trainer.args.learning_rate:g} for the rest"
    return words


def check_rate(given: float | None) -> None:
    """Raise a ValueError unless a `vector_learning_rate` is a finite number above 0, or None."""
    number = isinstance(given, int | float) and not isinstance(given, bool) and 0 < given <= sys.float_info.max
    if given is not None and not number:
        raise ValueError(
            f"vector_learning_rate={given!r} must be a finite number above 0, such as 1e-3. None leaves it to "
            "learning_rate."
        )


def check_optimizer(args: Any, vectors: Mapping[int, float | None], given: bool, rate: float | None) -> None:
    """Raise a ValueError for an optimiser that would not step vectors in their units or at their rate.

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
    if (
        not given
        and any(name in kind for name in _STEP_OUTSIDE)
        and any(unit is not None for unit in vectors.values())
    ):
        raise ValueError(
            f"optim={kind!r} changes parameters outside of optimizer.step(), but steering vectors are in units of the "
            "residual stream only during a step. Use another (optim='adamw_torch'), or absolute learning rates: "
            "SteeringVectorConfig(stream_sizes={})."
        )


def trained_vectors(model: nn.Module) -> dict[int, float | None]:
    """The trained parameters of steering vectors: id -> unit, None for one in absolute units."""
    return {
        id(vector.weight): vector.unit
        for layer in steering_layers(model)
        for kind in layer.adapter_layer_names
        for vector in getattr(layer, kind).values()
        if vector.weight.requires_grad
    }


def group_vectors(optimizer: Optimizer, model: nn.Module, rate: float) -> None:
    """Move the vectors in an optimiser to separate parameter groups, one per unit, with their own rate.

    Args:
        optimizer: A new optimiser, whose groups no scheduler has read yet.
        model: The model whose vectors are trained.
        rate: The learning rate of the vectors, in units of the residual stream.
    """
    vectors = trained_vectors(model)
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    # split every group, and keep its other options
    for group in groups:
        by_unit: dict[float | None, list[Any]] = {}
        for parameter in group["params"]:
            if id(parameter) in vectors:
                by_unit.setdefault(vectors[id(parameter)], []).append(parameter)
        others = [parameter for parameter in group["params"] if id(parameter) not in vectors]
        options = {name: value for name, value in group.items() if name != "params"}
        for unit, parameters in by_unit.items():
            unit_option = {} if unit is None else {units.UNIT: unit}
            optimizer.add_param_group({**options, **unit_option, "params": parameters, "lr": rate})
        if others:
            optimizer.add_param_group({**options, "params": others})


def agree_on_units(trainer: SteeringRun) -> None:
    """Give all processes the main process's units, and measure the stream for vectors that have none.

    A vector has none if the weights were sharded, or on the meta device, when it was made.
    """
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
    """Adopt the units of a checkpoint.

    Raises:
        CheckpointError: the checkpoint was trained with absolute learning rates, which mean something else.
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
            f"{folder} was trained with an absolute learning rate, but rates are now in units of the residual stream, "
            "so its schedule and optimizer state cannot continue. Start a new run from its vector instead: "
            "PeftModel.from_pretrained(model, folder, is_trainable=True)."
        )
    if sizes != config.stream_sizes:
        tuner.set_stream_sizes(name, sizes or {})


def largest_share(optimizer: Optimizer, scheduler: Any, steps: int, rate: float) -> float | None:
    """The share of the stream's size by which `steps` steps can move the vectors, if all have the same direction.

    None if the optimiser's steps do not have the size of the learning rate, as with SGD.
    """
    if not any(name in type(_innermost(optimizer)).__name__.lower() for name in _ADAPTIVE):
        return None
    inner = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    factors = [1.0] * steps
    if isinstance(inner, LambdaLR) and None not in inner.lr_lambdas:
        factors = [float(inner.lr_lambdas[0](step)) for step in range(steps)]
    return units.STEP_SHARE * rate * sum(factors)


def warning_of(rate: float, steps: int, share: float) -> str | None:
    """A warning about a rate that cannot move a vector, or makes it explode; None if there is no problem."""
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


def mark_deepspeeds_optimizer(trainer: SteeringRun, optimizer: Any) -> None:
    """Give the vectors' unit to an optimiser that DeepSpeed made from its own configuration.

    It holds all parameters as a single flat one, so they must share one unit and one rate.

    Raises:
        ValueError: they have several.
    """
    vectors = trained_vectors(trainer.model)
    others = [name for name, p in trainer.model.named_parameters() if p.requires_grad and id(p) not in vectors]
    rate = vector_rate(trainer.args, trainer.vector_learning_rate)
    unit, *other_units = set(vectors.values())
    advice = "Take 'optimizer' out of DeepSpeed's configuration: the Trainer then makes one that DeepSpeed wraps."
    if others or other_units:
        what = f"{others[0]} is trained too" if others else f"the vectors have {1 + len(other_units)} units"
        raise ValueError(f"DeepSpeed's optimizer has one flat parameter with one unit, but {what}. {advice}")
    if rate.value != trainer.args.learning_rate:
        raise ValueError(
            f"DeepSpeed's optimizer has learning_rate={trainer.args.learning_rate:g}, but the vectors have "
            f"{rate.value:g} ({rate.reason}). Set learning_rate={rate.value:g}. {advice}"
        )
    for group in _innermost(optimizer).param_groups:
        group[units.UNIT] = unit


def _innermost(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrappers
        optimizer = optimizer.optimizer
    return optimizer
