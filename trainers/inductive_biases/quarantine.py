"""Quarantine: one part of a LoRA starts along a direction, learns what goes there, and is dropped after training.

The last ranks of every LoRA start, where they write into the residual stream, with `B` along the direction v and
`A = 0`. So the model starts as it would without them, and the first gradient of these rows of `A` is the part of the
update that writes along v. Evaluations run without them, and at the end they are set to zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ...adapters.blocks import find_blocks
from ...adapters.observing import base_model
from ..frozen_vectors import randomised
from ..types import SteeringRun
from ._base import Bias, BiasError, write_of
from ._frozen import frozen_vectors


class Part(NamedTuple):
    """The LoRA of one map."""

    name: str
    a: nn.Module  # weight (r, inputs)
    b: nn.Module  # weight (outputs, r)
    first: int  # the first rank in quarantine


@dataclass(frozen=True)
class Quarantine(Bias):
    """Reserve the last ranks of a LoRA for one direction, and drop them after training.

    Args:
        vector: Folder of a saved steering vector of one layer.
        share: Share of the ranks.
        random_seed: Use a random direction instead, as a control.

    Raises:
        ValueError: the share is not between 0 and 1.
    """

    vector: str
    share: float = 0.5
    random_seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share!r} must be greater than 0 and less than 1.")

    @torch.no_grad()
    def start(self, trainer: SteeringRun) -> None:
        """Start these ranks along the direction.

        Raises:
            BiasError: no plain LoRA with two ranks or more is trained, none of it writes into the residual stream, or
                the folder holds no vector of this model.
        """
        vectors = frozen_vectors(self.vector, trainer.model, "quarantine")
        if len(vectors) != 1:
            raise BiasError(
                f"quarantine: {self.vector} has vectors at {len(vectors)} layers. Give a vector of one layer."
            )
        if self.random_seed is not None:
            vectors = randomised(vectors, self.random_seed)
        v_D = vectors[0].vector_D / vectors[0].vector_D.norm()
        parts, writes = self._parts(trainer.model), _writes(trainer.model)
        if not any(part.name in writes for part in parts):
            raise BiasError(
                "quarantine: no LoRA is on a map that writes into the residual stream. Add them to target_modules."
            )
        for part in parts:
            if part.name in writes:
                a_RI, b_OR = _weight(part.a), _weight(part.b)
                # the length that a row of A has when it is initialised as usual
                length = a_RI[: part.first].norm(dim=1).mean()
                b_OR[:, part.first :] = (v_D * length).to(b_OR)[:, None]
                a_RI[part.first :] = 0

    def note(self, trainer: SteeringRun) -> str:
        """A line about how many ranks are dropped."""
        parts = self._parts(trainer.model)
        ranks = sum(_weight(part.b).shape[1] for part in parts)
        dropped = ranks - sum(part.first for part in parts)
        return (
            f"{dropped} of {ranks} ranks, on {len(parts)} maps, are in quarantine: evaluation and the saved adapter "
            "drop them."
        )

    @contextmanager
    def during(self, trainer: SteeringRun) -> Iterator[None]:
        """Keep these ranks out of evaluations."""
        parts = self._parts(trainer.model)
        handles = [part.b.register_forward_pre_hook(_without(part.first)) for part in parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def finish(self, trainer: SteeringRun) -> None:
        """Drop these ranks: they are zero in what is saved."""
        for part in self._parts(trainer.model):
            _weight(part.b)[:, part.first :] = 0

    def _parts(self, model: nn.Module) -> list[Part]:
        """The trained LoRAs.

        Raises:
            BiasError: none is trained, or one cannot be divided.
        """
        parts = []
        for name, module in base_model(model).named_modules():
            if not isinstance(module, LoraLayer):
                continue
            for adapter in module.active_adapters:
                if adapter not in module.lora_B:
                    continue
                if module.use_dora.get(adapter):
                    raise BiasError("quarantine: DoRA's magnitudes are shared by all ranks. Set use_dora=False.")
                rank = module.r[adapter]
                first = rank - max(1, round(rank * self.share))
                if first < 1:
                    raise BiasError(f"quarantine: a LoRA of rank {rank} cannot be divided. Use r=2 or more.")
                parts.append(Part(name, module.lora_A[adapter], module.lora_B[adapter], first))
        if not parts:
            raise BiasError("quarantine divides the ranks of a LoRA, but none is trained. Use a LoraConfig.")
        return parts


def _weight(module: Any) -> Tensor:
    return module.weight


def _writes(model: nn.Module) -> set[str]:
    """Names, in the base model, of the maps that write into the residual stream."""
    names = set()
    for layer in range(len(find_blocks(base_model(model)))):
        for site in ("attention", "mlp"):
            names.add(write_of(model, layer, site)[1])
    return names


def _without(first: int) -> Any:
    """A hook that gives a map only the ranks before `first`, in evaluation mode."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if module.training:
            return None
        ranks = args[0].clone()
        ranks[..., first:] = 0
        return (ranks,)

    return hook
