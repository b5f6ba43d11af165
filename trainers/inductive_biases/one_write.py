"""Restrict updates to what one layer writes: the site of activation addition, for any adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..types import SteeringRun
from ._base import Bias, BiasError, check_layer, write_of


@dataclass(frozen=True)
class OneWrite(Bias):
    """Only the maps that write one block's attention and MLP into the residual stream are trained.

    Args:
        layer: The block: an index, or a fraction of the depth.
        site: `mlp`, `attention`, or `both`.

    Raises:
        ValueError: the site is unknown, or `layer` is not a layer.
    """

    layer: int | float = 0.67
    site: Literal["mlp", "attention", "both"] = "mlp"

    def __post_init__(self) -> None:
        check_layer(self.layer)
        if self.site not in ("mlp", "attention", "both"):
            raise ValueError(f"site={self.site!r} must be 'mlp', 'attention' or 'both'.")

    def start(self, trainer: SteeringRun) -> None:
        """Refuse a model that trains nothing there.

        Raises:
            BiasError: no trained parameter writes there.
        """
        trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        others = self._others(trainer, trained)
        if len(others) == len(trained):
            raise BiasError(
                f"one_write trains only the {self.site} write of layer {self.layer}, but no trained parameter is "
                f"there (trained: {[*trained][:4]}). Put the adapter on it (target_modules, layers_to_transform)."
            )

    @contextmanager
    def during(self, trainer: SteeringRun) -> Iterator[None]:
        """Freeze every other trained parameter."""
        others = self._others(trainer, {n: p for n, p in trainer.model.named_parameters() if p.requires_grad})
        handles = [parameter.register_post_accumulate_grad_hook(_forget) for parameter in others]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, handle in zip(others, handles, strict=True):
                parameter.requires_grad_(True)
                handle.remove()

    def before_forward(self, trainer: SteeringRun) -> None:
        """Freeze them again: PEFT unfreezes a whole adapter when it is enabled after the reference pass."""
        trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        for parameter in self._others(trainer, trained):
            parameter.requires_grad_(False)

    def _others(self, trainer: SteeringRun, trained: dict[str, nn.Parameter]) -> list[nn.Parameter]:
        """The trained parameters that do not write there."""
        sites = ("attention", "mlp") if self.site == "both" else (self.site,)
        writes = [write_of(trainer.model, self.layer, site)[1] for site in sites]
        return [p for name, p in trained.items() if not any(f".{write}." in f".{name}" for write in writes)]


def _forget(parameter: Tensor) -> None:
    parameter.grad = None
