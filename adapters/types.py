"""The types of the switches, and of the part of a configuration that describes weights. Imports no other module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

Form = Literal["bias", "span", "gated", "linear", "low_rank", "project"]
Site = Literal["block", "attention", "mlp"]
Norm = Literal["free", "fixed", "capped", "relative", "preserve", "learned"]
Positions = Literal["all", "completion", "prompt", "last_prompt"]
Layers = int | float | str | Sequence[int | float]
Strength = float | Literal["null"]

NORMS_WITH_VALUE = ("fixed", "capped", "relative")
CONSTANT_FORMS = ("bias", "span")
"""The forms that add the same vector to every state."""
GATELESS_FORMS = (*CONSTANT_FORMS, "project")
"""The forms that have no gate: a vector v alone, without w and b."""


def finite_strength(text: str) -> float | None:
    """The strength after the `@` of a name such as `careful@1.5`; None if it is not a finite number."""
    try:
        strength = float(text)
    except ValueError:
        return None
    return strength if math.isfinite(strength) else None


class Declared(Protocol):
    """The part of an adapter's configuration that describes its weights (see `SteeringVectorConfig`)."""

    form: Form
    layers: Layers
    tied: bool
    target_modules: str | None
    modules_to_save: list[str] | None
    base_fingerprint: dict[str, Any] | None

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The parameters that one steered layer holds."""
        ...

    def parameter_shape(self, name: str, d: int) -> tuple[int, ...]:
        """The shape of a parameter in a residual stream of width `d`."""
        ...
