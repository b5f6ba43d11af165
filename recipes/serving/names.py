"""Model names that select vectors: `base+careful@1.5+warm@-1`."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, Field

from steertune.adapters.types import Positions, finite_strength
from steertune.recipes.lab.files import ArmError, nearest, shown

BASE = "base"
"""A name for every base model, besides its own."""


class Steering(BaseModel, extra="forbid", strict=True):
    """A vector of a request.

    Attributes:
        vector: Its name.
        strength: 1 as trained, 0 the base model, negative the opposite.
        positions: Tokens that it steers; None: those that it was made for.
    """

    vector: str
    strength: float = Field(default=1.0, allow_inf_nan=False)
    positions: Positions | None = None


def read_model_name(name: str, base: str, vectors: Sequence[str]) -> list[Steering]:
    """The vectors in a model name.

    Args:
        name: The name: that of the base model or "base", followed by any number of `+VECTOR` or `+VECTOR@STRENGTH`.
        base: Name of the base model.
        vectors: Names of the vectors.

    Raises:
        ArmError: another base model, an unknown vector, or a strength that is not a finite number.
    """
    prefix = next((one for one in (base, BASE) if name == one or name.startswith(f"{one}+")), None)
    if prefix is None:
        models = [base] if base == BASE else [base, BASE]
        near = nearest(name, [*models, *(f"{BASE}+{vector}" for vector in vectors)])
        raise ArmError(
            f"model={shown(name)} is not served. It must be {' or '.join(map(repr, models))}, alone or followed by "
            f"vectors, as in '{BASE}+VECTOR@1.5'. Vectors are {list(vectors)}.{near}"
        )
    steering = []
    for part in name[len(prefix) + 1 :].split("+") if name != prefix else []:
        vector, at, number = part.partition("@")
        if vector not in vectors:
            raise ArmError(f"model={shown(name)}: {shown(vector)} is none of {[*vectors]}.{nearest(vector, vectors)}")
        steering.append(Steering(vector=vector, strength=_strength(name, number) if at else 1.0))
    return steering


def _strength(name: str, number: str) -> float:
    if (strength := finite_strength(number)) is None:
        raise ArmError(f"model={shown(name)}: {shown(number)} is not a finite strength. Write VECTOR@1.5.")
    return strength


def combined(named: Sequence[Steering], listed: Sequence[Steering]) -> list[Steering]:
    """The vectors of a request: those of its model name, then those of its `steering`.

    Raises:
        ArmError: one of them is named twice.
    """
    steering = [*named, *listed]
    names = [one.vector for one in steering]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ArmError(f"vector {repeated[0]!r} is named twice. Name it once, at the sum of its strengths.")
    return steering
