"""Preventative steering: a frozen vector is added while another adapter trains, and removed afterwards.

With a vector v of an unwanted trait, training on data that show the trait computes `h + a s(t) v` at v's layer, with
strength a and schedule s. The gradient then has less reason to move the weights towards the trait (Chen et al.
2507.21509, section 5.2). With a negative strength it has more reason to do so, for a wanted trait. Several vectors add
up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ...adapters.observing import base_model
from ..frozen_vectors import FrozenVector, randomised
from ..training_changes import Change
from ..types import SteeringRun
from ._frozen import InTraining, frozen_vectors, refuse_same_place

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "rising": lambda progress: progress,
    "falling": lambda progress: 1.0 - progress,
}
"""Name -> function from the completed share of training to a factor of the strength."""


@dataclass(frozen=True)
class PreventativeSteering(InTraining):
    """Frozen steering vectors that training adds, and evaluation does not.

    Args:
        vector: Folder of a saved steering vector, or several.
        strength: Factor of every vector, or one for each; if negative, the opposite vector is added.
        schedule: `constant`, `rising` from 0 to the whole strength, or `falling` to 0.
        random_seed: Add random directions of the same lengths instead, as a control.

    Raises:
        ValueError: an option makes no sense.
    """

    vector: str | tuple[str, ...]
    strength: float | tuple[float, ...] = 1.0
    schedule: Literal["constant", "rising", "falling"] = "constant"
    random_seed: int | None = None

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} must be one of {', '.join(SCHEDULES)}.")
        if not self.folders:
            raise ValueError("vector=[] is empty: give the folder of a saved steering vector.")
        if len(self.strengths) != len(self.folders):
            raise ValueError(
                f"strength={self.strength!r} has {len(self.strengths)} values for {len(self.folders)} vectors. Give "
                "one number, or one for each vector."
            )
        if not all(self.strengths):
            raise ValueError(f"strength={self.strength!r} must not be 0, which would change nothing.")

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of all vectors."""
        return (self.vector,) if isinstance(self.vector, str) else tuple(self.vector)

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strength of every vector."""
        if isinstance(self.strength, int | float):
            return (float(self.strength),) * len(self.folders)
        return tuple(map(float, self.strength))

    def start(self, trainer: SteeringRun) -> None:
        """Read and check the vectors.

        Raises:
            BiasError: a folder holds no vector of this model, or a vector is trained at the same place.
        """
        self.check_passes(trainer, "preventative_steering")
        modules = [frozen.module for folder in self.folders for frozen in self._read(trainer, folder)]
        refuse_same_place(trainer.model, modules, "preventative_steering")

    def note(self, trainer: SteeringRun) -> str:
        """A line about what is added, and where."""
        parts = []
        for folder, strength in zip(self.folders, self.strengths, strict=True):
            layers = ", ".join(str(frozen.layer) for frozen in self._read(trainer, folder))
            parts.append(f"{strength:+g} x {folder} at layer {layers}")
        control = "" if self.random_seed is None else " (random directions of these lengths)"
        return (
            f"Training adds {' and '.join(parts)}{control}; evaluation and the saved adapter are without "
            f"{'it' if len(parts) == 1 else 'them'}."
        )

    def changes(self, trainer: SteeringRun) -> list[tuple[nn.Module, Change]]:
        """Add the vectors, at the strength of the schedule."""
        base, factor = base_model(trainer.model), SCHEDULES[self.schedule]

        def added(vector_D: Tensor) -> Change:
            def change(h_RCD: Tensor) -> Tensor:
                # looked up here, because every training run makes a new state
                state = trainer.state
                strength = factor(state.global_step / max(state.max_steps, 1))
                return h_RCD + (strength * vector_D).to(h_RCD)

            return change

        return [
            (base.get_submodule(frozen.module), added(strength * frozen.vector_D))
            for folder, strength in zip(self.folders, self.strengths, strict=True)
            for frozen in self._read(trainer, folder)
        ]

    def _read(self, trainer: SteeringRun, folder: str) -> list[FrozenVector]:
        vectors = frozen_vectors(folder, trainer.model, "preventative_steering")
        return vectors if self.random_seed is None else randomised(vectors, self.random_seed)
