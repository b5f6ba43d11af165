"""Ablation during training: a direction is projected out of the residual stream while another adapter trains.

Every block's output h becomes `h - (h·u) u`, with u the unit vector of a saved direction. The model cannot use the
direction while it learns, so it has to learn without it (concept ablation finetuning, Casademunt et al. 2507.16795).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ...adapters.blocks import find_blocks, resolve_layers
from ...adapters.observing import base_model
from ..frozen_vectors import FrozenVector, randomised
from ..training_changes import Change
from ..types import SteeringRun
from ._base import BiasError, check_layer
from ._frozen import InTraining, frozen_vectors


@dataclass(frozen=True)
class Ablation(InTraining):
    """Project a direction out of the residual stream during training.

    Args:
        vector: Folder of a saved steering vector.
        layers: The blocks after which it is projected out: an index, a fraction of the depth, a list, or `all`. A
            vector of one layer is used at all of them; vectors of several layers are used at their own layers.
        random_seed: Project out a random direction instead, as a control.

    Raises:
        ValueError: `layers` names no layers.
    """

    vector: str
    layers: str | int | float | tuple[int | float, ...] = "all"
    random_seed: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) and self.layers != "all":
            raise ValueError(f"layers={self.layers!r} must be an index, a fraction of the depth, a list, or 'all'.")
        for layer in () if isinstance(self.layers, str) else self._listed():
            check_layer(layer)

    def start(self, trainer: SteeringRun) -> None:
        """Read and check the direction.

        Raises:
            BiasError: the folder holds no vector of this model, or none for one of the layers.
        """
        self.check_passes(trainer, "ablation")
        self._directions(trainer)

    def note(self, trainer: SteeringRun) -> str:
        """A line about what is projected out, and where."""
        layers = [*self._directions(trainer)]
        where = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers"
        what = f"the direction of {self.vector}" if self.random_seed is None else "a random direction"
        return f"Training projects {what} out at {where}; evaluation and the saved adapter keep it."

    def changes(self, trainer: SteeringRun) -> list[tuple[nn.Module, Change]]:
        """Project the direction out of the output of every block."""
        blocks = find_blocks(base_model(trainer.model))

        def without(unit_D: Tensor) -> Change:
            def change(h_RCD: Tensor) -> Tensor:
                u_D = unit_D.to(h_RCD)
                return h_RCD - (h_RCD @ u_D)[..., None] * u_D

            return change

        return [(blocks[layer][1], without(unit_D)) for layer, unit_D in self._directions(trainer).items()]

    def _listed(self) -> list[int | float]:
        assert not isinstance(self.layers, str)
        return [self.layers] if isinstance(self.layers, int | float) else [*self.layers]

    def _directions(self, trainer: SteeringRun) -> dict[int, Tensor]:
        """Layer -> unit vector, `(d,)`."""
        vectors: list[FrozenVector] = frozen_vectors(self.vector, trainer.model, "ablation")
        if self.random_seed is not None:
            vectors = randomised(vectors, self.random_seed)
        depth = len(find_blocks(base_model(trainer.model)))
        try:
            layers = resolve_layers("all" if self.layers == "all" else self._listed(), depth)
        except ValueError as error:
            raise BiasError(f"ablation: {error}") from error
        by_layer = {frozen.layer: frozen.vector_D / frozen.vector_D.norm() for frozen in vectors}
        if len(by_layer) == 1:
            by_layer = dict.fromkeys(layers, *by_layer.values())
        if missing := [layer for layer in layers if layer not in by_layer]:
            raise BiasError(
                f"ablation: {self.vector} has vectors at {[*by_layer]}, but none for layer {missing[0]}. Choose "
                "layers that it has (layers=), or a vector of one layer, which is used at all of them."
            )
        return {layer: by_layer[layer] for layer in layers}
