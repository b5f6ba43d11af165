"""What a loss contrasts the chosen answer with: an ingredient of its own, for any loss on pairs.

| `contrast` | the rejected side of pair i |
|---|---|
| `paired` | its own rejected answer |
| `unpaired` | the rejected answer of pair i+1 of the batch, to another prompt: same answers, no matching |
| `none` | nothing: the rejected answer keeps its reference log-probability, so only the chosen answer is trained on |

Over a batch, `unpaired` pushes the same answers up and down as `paired`: where the adapter still does nothing, both
have the same gradient. It tests the matching in the loss; rejected answers behind other prompts are a matter of the
data (`pairing = "shuffled"` of an arm's `[data]`).

A loss of one answer, such as cross-entropy, takes contrast too:

| `contrast` | the loss of pair i |
|---|---|
| `difference` | `[ℓ(y⁺) - ℓ(y⁻)] / 2`, ℓ averaged over an answer's tokens: the gradient averaged over the contrast |

What both answers say about their prompt cancels in this gradient, as it does in a mean difference of states. As there,
nothing but a length bounds it: add `change_cap`, or train few steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ._base import At, Outputs
from ._wrapped import Wrapped, parts, per_row

Contrast = Literal["paired", "unpaired", "none", "difference"]


@dataclass(frozen=True)
class Contrasted(Wrapped):
    """A loss with another contrast.

    Args:
        loss: The loss, of pairs or (`difference`) of one answer.
        contrast: See the tables of this module.

    Raises:
        ValueError: the loss has no rejected side; `none` for a loss without a reference; `unpaired` for one that adds
            up a term of each answer; `difference` for a loss of pairs, or of views or states, whose target is not
            another for the rejected answer.
    """

    contrast: Contrast

    def __post_init__(self) -> None:
        if self.contrast not in get_args(Contrast):
            raise ValueError(f"contrast={self.contrast!r} is none of {', '.join(map(repr, get_args(Contrast)))}.")
        if self.contrast == "difference":
            self._check_difference()
        elif not self.loss.needs.pairs:
            raise ValueError(
                f"{type(self.loss).__name__} has no rejected answers, so no contrast={self.contrast!r}: 'difference' "
                "is the contrast of a loss of one answer."
            )
        if self.contrast == "unpaired" and self.loss.needs.separable:
            raise ValueError(
                f"{type(parts(self.loss)[-1]).__name__} adds up a term of the chosen and one of the rejected answer: "
                "which is paired with which changes nothing. contrast='unpaired' is for losses that compare them."
            )
        if self.contrast == "none" and not self.loss.needs.reference:
            raise ValueError(
                f"contrast='none' holds the rejected answer at the reference, which {type(self.loss).__name__} does "
                "not use. Choose a loss with a reference, or cross_entropy."
            )
        self._need(pairs=True, unit="example" if self.contrast == "difference" else self.loss.needs.unit)

    def _check_difference(self) -> None:
        if self.loss.needs.pairs:
            raise ValueError(f"{type(self.loss).__name__} compares answers already, so no contrast='difference'.")
        if self.loss.needs.views or self.loss.needs.states:
            raise ValueError(
                f"{type(self.loss).__name__} has a target for every token, rejected ones too: contrast='difference' "
                "is for losses of the answer alone, such as cross_entropy."
            )

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """As the loss, on pairs whose rejected side is another; the difference `(pairs,)`.

        Raises:
            ValueError: `unpaired` in a batch of one pair.
        """
        if self.contrast == "difference":
            chosen, rejected = self._per_row(self.loss(at, generator), at(1.0).mask).chunk(2)
            return (chosen - rejected) / 2
        if self.contrast == "none":
            return self.loss(self._seen(at, lambda _: at(0.0).rejected), generator)
        if self.contrast == "unpaired":
            return self.loss(self._seen(at, lambda outputs: _next(outputs.rejected)), generator)
        return self.loss(at, generator)

    @staticmethod
    def _seen(at: At, rejected: Callable[[Outputs], Outputs]) -> At:
        """The batch with another rejected side; states and distributions, which a term around a loss asks for, are
        those of the rows as they are."""

        def seen(strength: Any, **asked: Any) -> Outputs:
            outputs = at(strength, **asked)
            return outputs if asked else _rejected(outputs, rejected(outputs))

        return seen

    def _per_row(self, value: Tensor, mask: Tensor) -> Tensor:
        """A loss of one answer as one number a row."""
        if self.loss.needs.unit == "example":
            return value
        return per_row(value[mask] if value.ndim > 1 else value, mask)


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
