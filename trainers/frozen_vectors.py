"""Vectors of saved adapters that take part in another training without being trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..adapters.analysis.arithmetic import VectorError, read
from ..adapters.analysis.controls import random_directions
from ..adapters.fingerprint import check_fingerprint
from ..adapters.observing import base_model


class FrozenVectorError(ValueError):
    """Raised when a folder holds no vector that can be added to a model unchanged; the message gives the reason."""


class FrozenVector(NamedTuple):
    """A vector at one place of the model."""

    layer: int
    module: str  # name in the base model
    vector_D: Tensor


def read_frozen_vectors(folder: str, model: nn.Module) -> list[FrozenVector]:
    """Read the vectors of an adapter folder that are added to this model.

    Args:
        folder: A saved steering vector.
        model: The model that is trained.

    Raises:
        FrozenVectorError: the folder holds no vector that can be added at every token, or one of another base model.
    """
    base: Any = base_model(model)
    try:
        vectors = read(folder)
        if vectors.base is not None:
            check_fingerprint(vectors.base, base)
    except (VectorError, ValueError, OSError) as error:
        raise FrozenVectorError(str(error)) from error
    if vectors.positions != "all" or vectors.norm == "preserve":
        what = f"positions={vectors.positions!r}" if vectors.positions != "all" else "norm='preserve'"
        raise FrozenVectorError(
            f"{folder} has {what}. Only a vector that is added unchanged to every token can be used."
        )
    if not any(bool(vector.any()) for vector in vectors.vectors.values()):
        raise FrozenVectorError(f"the vector of {folder} is zero, so it would change nothing.")
    embedding = base.get_input_embeddings().weight
    width = embedding.shape[-1]
    modules = dict(base.named_modules())
    frozen = []
    for layer, vector_D in vectors.vectors.items():
        module = vectors.modules[layer]
        if len(vector_D) != width or module not in modules:
            raise FrozenVectorError(
                f"{folder} has a vector of {len(vector_D)} numbers at {module}, which does not fit "
                f"{type(base).__name__} with a residual stream of width {width}."
            )
        # on the model's device, so that no pass has to copy it
        frozen.append(FrozenVector(layer, module, vector_D.to(embedding.device)))
    return frozen


def randomised(vectors: Sequence[FrozenVector], seed: int) -> list[FrozenVector]:
    """Random directions of the same lengths at the same places, as a control."""
    directions = random_directions([one.vector_D for one in vectors], seed)
    return [one._replace(vector_D=direction_D) for one, direction_D in zip(vectors, directions, strict=True)]
