"""The base class of inductive biases, and their lookup by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...adapters.blocks import find_blocks, resolve_layers, site_name
from ...adapters.observing import base_model
from ...adapters.registry import by_name, file_names
from ...adapters.types import Site
from ..types import SteeringRun

_FOLDER = Path(__file__).parent


class BiasError(ValueError):
    """Raised when a bias does not work with this model or set-up; the message says what it works with."""


class Bias(ABC):
    """A change to how parameters are trained. Subclasses are frozen dataclasses of their options, one file each.

    Attributes:
        whole_rows: Whether every row must run in one piece (otherwise, a prompt that two answers share runs once).
        saved: Whether a saved adapter holds everything that is trained.
        own_passes: Whether it changes forward passes, so that the model cannot share them with another trainer's.
    """

    whole_rows: ClassVar[bool] = False
    saved: ClassVar[bool] = True
    own_passes: ClassVar[bool] = False

    @abstractmethod
    def start(self, trainer: SteeringRun) -> None:
        """Prepare the model once, before the optimiser exists.

        Raises:
            BiasError: the bias would have no effect, or not the one it claims.
        """

    def training_rows(self, rows: Any) -> Any:
        """Change the training data before they are tokenised; by default, return them unchanged.

        Raises:
            BiasError: the rows have a format that cannot be changed.
        """
        return rows

    def note(self, trainer: SteeringRun) -> str:
        """A line to log at the start of training; by default, none."""
        return ""

    def during(self, trainer: SteeringRun) -> AbstractContextManager[None]:
        """Context around every training run. It must leave no hook on the model. By default it does nothing."""
        return nullcontext()

    def finish(self, trainer: SteeringRun) -> None:
        """Act after a training run that was completed; by default, do nothing."""
        return

    def before_forward(self, trainer: SteeringRun) -> None:
        """Act before the forward pass of every micro-batch; by default, do nothing."""
        return

    def gradients(self, trainer: SteeringRun) -> None:
        """Change the gradients before every optimiser step, after clipping; by default, do nothing."""
        return


def names() -> list[str]:
    """The names of all biases: the files of this folder that do not start with an underscore."""
    return file_names(_FOLDER)


def get_bias(bias: str | Bias, **options: Any) -> Bias:
    """Make a bias by its name (its file) and options; a `Bias` object is returned unchanged.

    Raises:
        ValueError: the name or an option is unknown (the message names the nearest), or options come with an object.
    """
    return by_name("bias", str(__package__), _FOLDER, Bias, bias, options)


def check_layer(layer: int | float) -> None:
    """Raise a ValueError unless a layer is an index or a fraction of the depth."""
    if not layer >= 0 or (isinstance(layer, float) and layer >= 1):
        raise ValueError(f"layer={layer!r} must be an index from 0, or a fraction of the depth in [0, 1).")


def trained_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained weights with two dimensions, or with three: one matrix per expert."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and p.ndim in (2, 3)}


def write_of(model: nn.Module, layer: int | float, site: Site) -> tuple[int, str]:
    """Find the linear map that writes a site's output into the residual stream.

    It is the last map of the attention or the MLP that has as many outputs as the stream is wide.

    Returns:
        The layer's index, and the map's name in the base model.

    Raises:
        BiasError: the block has no such map, or one per expert.
    """
    base: Any = base_model(model)
    blocks = find_blocks(base)
    [index] = resolve_layers(layer, len(blocks))
    try:
        where = site_name(*blocks[index], site)
    except ValueError as error:
        raise BiasError(str(error)) from error
    module, width = base.get_submodule(where), base.get_input_embeddings().weight.shape[-1]
    names = [name for name, part in _maps(module) if _outputs(part) == width]
    # experts are one tensor with three dimensions, or a numbered list of modules
    experts = any(p.ndim > 2 for p in module.parameters()) or any(
        part.isdigit() for name in names for part in name.split(".")
    )
    if experts:
        raise BiasError(
            f"The {site} of block {index} writes through experts, which have one map each. Use another layer or site."
        )
    if not names:
        raise BiasError(f"The {site} of block {index} has no linear map to the residual stream (of width {width}).")
    return index, f"{where}.{names[-1]}"


def _maps(module: nn.Module, name: str = "") -> Iterator[tuple[str, Any]]:
    """The modules of the base model inside a module, without what adapters add."""
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}".lstrip(".")
        if isinstance(child, BaseTunerLayer):
            yield full, child.get_base_layer()
        else:
            yield full, child
            yield from _maps(child, full)


def _outputs(module: nn.Module) -> int | None:
    """How many outputs a linear map has; None for other modules."""
    if isinstance(module, Conv1D):  # GPT-2's
        return module.nf
    width = getattr(module, "out_features", None)  # quantised maps are not nn.Linear
    return width if isinstance(width, int) else None
