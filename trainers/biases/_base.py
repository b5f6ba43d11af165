"""What a bias is, and how it is found by its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainerCallback

from ...adapters.blocks import find_blocks, resolve_layers, site_name
from ...adapters.config import Site
from .._registry import by_name, file_names
from ..prefix.decoder import base_of

_FOLDER = Path(__file__).parent


class BiasError(ValueError):
    """A bias cannot be put on this model or this way of training; the message says what can carry it."""


class Bias(ABC):
    """A change of how parameters are trained. Subclasses are frozen dataclasses of their options, one file each.

    Attributes:
        whole_rows: Whether every row must run in one piece (a prompt that two answers share runs once otherwise).
    """

    whole_rows: ClassVar[bool] = False

    @abstractmethod
    def start(self, trainer: Any) -> None:
        """Once, before the optimiser exists.

        Raises:
            BiasError: it would change nothing, or not what it says.
        """

    def during(self, trainer: Any) -> AbstractContextManager[None]:
        """Around every training; what it hangs on the model is gone afterwards. Nothing, by default."""
        return nullcontext()

    def before_forward(self, trainer: Any) -> None:
        """Before the forward pass of every micro-batch; nothing, by default."""
        return

    def gradients(self, trainer: Any) -> None:
        """Before every optimiser step, when gradients are there and clipped; as they are, by default."""
        return


class Biased(TrainerCallback):
    """Lets biases at the gradients of a trainer."""

    def __init__(self, trainer: Any, biases: list[Bias]) -> None:
        self.trainer, self.biases = trainer, biases

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer event: a step begins, with its first micro-batch."""
        for bias in self.biases:
            bias.before_forward(self.trainer)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer event: another micro-batch of the step comes next."""
        for bias in self.biases:
            bias.before_forward(self.trainer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer event: gradients are there and clipped, parameters not yet changed."""
        for bias in self.biases:
            bias.gradients(self.trainer)


def names() -> list[str]:
    """The biases: the files of this folder."""
    return file_names(_FOLDER)


def get_bias(bias: str | Bias, **options: Any) -> Bias:
    """A bias by name (its file), with its options; a `Bias` object is returned as it is.

    Raises:
        ValueError: an unknown name or option (the message names the nearest), options for an object.
    """
    return by_name("bias", str(__package__), _FOLDER, Bias, bias, options)


def check_layer(layer: int | float) -> None:
    """Raise a ValueError for what is neither an index nor a fraction of the depth."""
    if not layer >= 0 or (isinstance(layer, float) and layer >= 1):
        raise ValueError(f"layer={layer!r}: an index from 0, or a fraction of the depth in [0, 1).")


def trained_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained weights with two dimensions, or three: a matrix for every expert."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and p.ndim in (2, 3)}


def write_of(model: nn.Module, layer: int | float, site: Site) -> tuple[int, str]:
    """The layer's index, and the name (in the base model) of the linear map that writes a site's output into the
    residual stream: the last of the attention's or the MLP's whose outputs are as many as the stream is wide.

    Raises:
        BiasError: there is no such map, or experts have one each.
    """
    base: Any = base_of(model)
    blocks = find_blocks(base)
    [index] = resolve_layers(layer, len(blocks))
    try:
        where = site_name(*blocks[index], site)
    except ValueError as error:
        raise BiasError(str(error)) from error
    module, width = base.get_submodule(where), base.get_input_embeddings().weight.shape[-1]
    found = [name for name, part in _maps(module) if _outputs(part) == width]
    several = any(p.ndim > 2 for p in module.parameters()) or any(
        part.isdigit() for n in found for part in n.split(".")
    )
    if several:
        raise BiasError(
            f"The {site} of block {index} writes through experts, each with a map of its own: name others."
        )
    if not found:
        raise BiasError(f"The {site} of block {index} has no linear map to the residual stream (of width {width}).")
    return index, f"{where}.{found[-1]}"


def _maps(module: nn.Module, name: str = "") -> Iterator[tuple[str, Any]]:
    """Linear maps of a module as the base model has them: what adapters put inside is not looked at."""
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}".lstrip(".")
        if isinstance(child, BaseTunerLayer):
            yield full, child.get_base_layer()
        else:
            yield full, child
            yield from _maps(child, full)


def _outputs(module: nn.Module) -> int | None:
    """How many outputs a linear map has; None for other modules."""
    width = getattr(module, "out_features", getattr(module, "nf", None))  # Conv1D of GPT-2 says nf
    return width if isinstance(width, int) else None
