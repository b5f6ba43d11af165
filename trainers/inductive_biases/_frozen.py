"""Shared code of biases with frozen vectors, which are read from adapter folders and change training passes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from typing import ClassVar

from torch import nn

from ...adapters import steering_layers
from ...adapters.observing import base_model
from ..frozen_vectors import FrozenVector, FrozenVectorError, read_frozen_vectors
from ..training_changes import Change, TrainingChange
from ..types import SteeringRun
from ._base import Bias, BiasError


class InTraining(Bias):
    """A bias that changes the residual stream in training passes only.

    Saved adapters and evaluations do not include the change.
    """

    own_passes: ClassVar[bool] = True

    @abstractmethod
    def changes(self, trainer: SteeringRun) -> list[tuple[nn.Module, Change]]:
        """The modules whose outputs are changed, each with its change."""

    def check_passes(self, trainer: SteeringRun, name: str) -> None:
        """Refuse training arguments with which a change would be missing from some passes.

        Raises:
            BiasError: the message names the argument.
        """
        args = trainer.args
        kwargs = args.gradient_checkpointing_kwargs or {}
        if args.gradient_checkpointing and kwargs.get("use_reentrant", False):
            raise BiasError(
                f"{name}: reentrant gradient checkpointing runs its first pass without gradients, where nothing is "
                "changed. Set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )

    def during(self, trainer: SteeringRun) -> ExitStack:
        """Attach the changes to the model."""
        with ExitStack() as stack:
            for module, change in self.changes(trainer):
                stack.callback(TrainingChange(change).on(module).remove)
            return stack.pop_all()


def frozen_vectors(folder: str, model: nn.Module, name: str) -> list[FrozenVector]:
    """Read the vectors of an adapter folder that are added to this model.

    Args:
        folder: A saved steering vector.
        model: The model that is trained.
        name: The bias, for messages.

    Raises:
        BiasError: the folder holds no vector that can be added at every token, or one of another base model.
    """
    try:
        return read_frozen_vectors(folder, model)
    except FrozenVectorError as error:
        raise BiasError(f"{name}: {error}") from error


def refuse_same_place(model: nn.Module, modules: Sequence[str], name: str) -> None:
    """Refuse a frozen vector where a constant vector is trained, which would then learn the difference of the two.

    Raises:
        BiasError: the message names the place.
    """
    base = base_model(model)
    places = {id(base.get_submodule(module)): module for module in modules}
    for layer in steering_layers(model):
        steered = next((m for m in base.modules() if layer in m.children()), None)
        trained = any(p.requires_grad for p in layer.parameters())
        if trained and steered is not None and id(steered) in places:
            raise BiasError(
                f"{name}: a steering vector is trained at {places[id(steered)]}, where the frozen one is also added. "
                "It would learn the same vector minus the frozen one. Train another layer, or a LoRA."
            )
