"""What a pair loss contrasts the chosen answer with: an ingredient of its own, for any pair loss.

| `contrast` | the rejected side of pair i |
|---|---|
| `paired` | its own rejected answer |
| `unpaired` | the rejected answer of pair i+1 of the batch, to another prompt: same answers, no matching |
| `none` | nothing: the rejected answer keeps its reference log-probability, so only the chosen answer is trained on |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ._base import At, Outputs
from ._wrapped import Wrapped

Contrast = Literal["paired", "unpaired", "none"]


@dataclass(frozen=True)
class Contrasted(Wrapped):
    """A pair loss with another contrast.

    Args:
        loss: The pair loss.
        contrast: See the table of this module.

    Raises:
        ValueError: the loss has no rejected side; `none` for a loss without a reference.
    """

    contrast: Contrast

    def __post_init__(self) -> None:
        if self.contrast not in ("paired", "unpaired", "none"):
            raise ValueError(f"contrast={self.contrast!r} is none of 'paired', 'unpaired', 'none'.")
        if not self.loss.pairs:
            raise ValueError(f"{type(self.loss).__name__} has no rejected answers, so no contrast={self.contrast!r}.")
        if self.contrast == "none" and not self.loss.reference:
            raise ValueError(
                f"contrast='none' holds the rejected answer at the reference, which {type(self.loss).__name__} does "
                "not use. Choose a loss with a reference, or cross_entropy."
            )

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """As the loss, on pairs whose rejected side is another.

        Raises:
            ValueError: `unpaired` in a batch of one pair.
        """
        if self.contrast == "none":
            return self.loss(lambda strength: _rejected(at(strength), at(0.0).rejected), generator)
        if self.contrast == "unpaired":
            return self.loss(lambda strength: _rejected(at(strength), _next(at(strength).rejected)), generator)
        return self.loss(at, generator)


def _rejected(outputs: Outputs, rejected: Outputs) -> Outputs:
    chosen = outputs.chosen
    return replace(
        outputs,
        token_logps=torch.cat([chosen.token_logps, rejected.token_logps]),
        mask=torch.cat([chosen.mask, rejected.mask]),
    )


def _next(rejected: Outputs) -> Outputs:
    if len(rejected.mask) < 2:
        raise ValueError("contrast='unpaired' needs at least 2 pairs in a batch: raise per_device_train_batch_size.")
    return Outputs(rejected.token_logps.roll(-1, dims=0), rejected.mask.roll(-1, dims=0))
