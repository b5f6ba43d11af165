"""Frozen vectors that take part in training: read from adapter folders, checked against the model, described."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ...adapters import steering_layers
from ...adapters.analysis.arithmetic import VectorError, read
from ...adapters.fingerprint import check_fingerprint
from ..prefix.decoder import base_of
from ..training_changes import Change, TrainingChange
from ..types import SteeringRun
from ._base import Bias, BiasError


class FrozenVector(NamedTuple):
    """A vector at one place of the model."""

    layer: int
    module: str  # name in the base model
    vector_D: Tensor


class InTraining(Bias):
    """A bias that changes the residual stream in training passes only.

    Adapters that are saved and evaluations know nothing of it.
    """

    own_passes: ClassVar[bool] = True

    @abstractmethod
    def changes(self, trainer: SteeringRun) -> list[tuple[nn.Module, Change]]:
        """The modules whose outputs are changed, each with what happens to it."""

    def check_passes(self, trainer: SteeringRun, name: str) -> None:
        """Refuse ways to train in which a change would not be at work in every pass.

        Raises:
            BiasError: names the argument.
        """
        args = trainer.args
        kwargs = args.gradient_checkpointing_kwargs or {}
        if args.gradient_checkpointing and kwargs.get("use_reentrant", False):
            raise BiasError(
                f"{name}: reentrant gradient checkpointing runs its first pass without gradients, where nothing is "
                "changed. Set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )

    def during(self, trainer: SteeringRun) -> ExitStack:
        """Hang the changes on the model."""
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
    base: Any = base_of(model)
    try:
        vectors = read(folder)
        if vectors.base is not None:
            check_fingerprint(vectors.base, base)
    except (VectorError, ValueError, OSError) as error:
        raise BiasError(f"{name}: {error}") from error
    if vectors.positions != "all" or vectors.norm == "preserve":
        what = f"positions={vectors.positions!r}" if vectors.positions != "all" else "norm='preserve'"
        raise BiasError(
            f"{name}: {folder} has {what}. Only a vector that is added as it is to every token can be used."
        )
    if not any(bool(vector.any()) for vector in vectors.vectors.values()):
        raise BiasError(f"{name}: the vector of {folder} is zero, so it would change nothing.")
    embedding = base.get_input_embeddings().weight
    width = embedding.shape[-1]
    found = []
    for layer, vector_D in vectors.vectors.items():
        module = vectors.modules[layer]
        if len(vector_D) != width or module not in dict(base.named_modules()):
            raise BiasError(
                f"{name}: {folder} has a vector of {len(vector_D)} numbers at {module}, which does not fit "
                f"{type(base).__name__} with a residual stream of width {width}."
            )
        # here, so that no pass has to copy it
        found.append(FrozenVector(layer, module, vector_D.to(embedding.device)))
    return found


def refuse_same_place(model: nn.Module, modules: Sequence[str], name: str) -> None:
    """Refuse a frozen vector where a constant vector is trained: it would learn the difference of the two.

    Raises:
        BiasError: names the place.
    """
    base = base_of(model)
    places = {id(base.get_submodule(module)): module for module in modules}
    for layer in steering_layers(model):
        steered = next((m for m in base.modules() if layer in m.children()), None)
        trained = any(p.requires_grad for p in layer.parameters())
        if trained and steered is not None and id(steered) in places:
            raise BiasError(
                f"{name}: a steering vector is trained at {places[id(steered)]}, where the frozen one is used, too. "
                "It would learn the same vector as without, less the frozen one. Train another layer, or a LoRA."
            )


def random_directions(vectors: Sequence[FrozenVector], seed: int) -> list[FrozenVector]:
    """Random directions of the same lengths at the same places, as a control."""
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(len(one.vector_D), generator=generator).to(one.vector_D) for one in vectors]
    return [
        frozen._replace(vector_D=direction * frozen.vector_D.norm() / direction.norm())
        for frozen, direction in zip(vectors, directions, strict=True)
    ]
