"""What the chosen answer is contrasted with, an option of any loss on pairs.

| `contrast` | the rejected side of pair i |
|---|---|
| `paired` | its own rejected answer |
| `unpaired` | the rejected answer of pair i+1 of the batch, to another prompt: the same answers, but not matched |
| `none` | nothing: its log-probability is that of the reference, so only the chosen answer is trained on |

Over a batch, `unpaired` pushes the same answers up and down as `paired`: while the adapter has no effect yet, both
have the same gradient. It tests the matching in the loss. To put rejected answers after other prompts, change the
data (`pairing = "shuffled"` in an arm's `[data]`).

A loss on single answers, such as cross-entropy, can be contrasted too:

| `contrast` | the loss of pair i |
|---|---|
| `difference` | `[ℓ(y⁺) - ℓ(y⁻)] / 2`, ℓ averaged over an answer's tokens: the gradient averaged over the contrast |

What both answers share, such as their prompt, cancels in this gradient, as in a mean difference of states. Like a
mean difference, it has no natural length: add `change_cap`, or train for few steps.
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
        loss: The loss, on pairs or (`difference`) on single answers.
        contrast: See the tables of this module.

    Raises:
        ValueError: the loss has no rejected side; `none` for a loss without a reference; `unpaired` for a loss that
            adds up a term of each answer; `difference` for a loss on pairs, or on views or states, which has the same
            target for both answers.
    """

    contrast: Contrast

    def __post_init__(self) -> None:
        if self.contrast not in get_args(Contrast):
            raise ValueError(f"contrast={self.contrast!r} must be one of {', '.join(map(repr, get_args(Contrast)))}.")
        if self.contrast == "difference":
            self._check_difference()
        elif not self.loss.needs.pairs:
            raise ValueError(
                f"contrast={self.contrast!r} needs a loss on pairs, but {type(self.loss).__name__} reads single "
                "answers. Use contrast='difference', or a loss on pairs."
            )
        if self.contrast == "unpaired" and self.loss.needs.separable:
            raise ValueError(
                f"{type(parts(self.loss)[-1]).__name__} adds up a term of the chosen and one of the rejected answer, "
                "so how they are paired changes nothing. Use contrast='unpaired' with a loss that compares them."
            )
        if self.contrast == "none" and not self.loss.needs.reference:
            raise ValueError(
                f"contrast='none' keeps the rejected answer at its reference, which {type(self.loss).__name__} does "
                "not use. Choose a loss with a reference, or cross_entropy."
            )
        self._need(pairs=True, unit="example" if self.contrast == "difference" else self.loss.needs.unit)

    def _check_difference(self) -> None:
        if self.loss.needs.pairs:
            raise ValueError(
                f"contrast='difference' is for losses on single answers, but {type(self.loss).__name__} is a loss on "
                "pairs. Leave it out."
            )
        if self.loss.needs.views or self.loss.needs.states:
            raise ValueError(
                f"{type(self.loss).__name__} has the same target for chosen and rejected tokens. "
                "contrast='difference' is for losses on the answer alone, such as cross_entropy."
            )

    def __call__(self, at: At, generator: torch.Generator | None = None) -> Tensor:
        """Like the loss, with another rejected side; for a difference, `(pairs,)`.

        Raises:
            ValueError: `unpaired` with a batch of one pair.
        """
        if self.contrast == "difference":
            chosen, rejected = self._per_row(self.loss(at, generator), at(1.0).mask).chunk(2)
            return (chosen - rejected) / 2
        if self.contrast == "none":
            return self.loss(_with_rejected(at, lambda _: at(0.0).rejected), generator)
        if self.contrast == "unpaired":
            return self.loss(_with_rejected(at, lambda outputs: _next(outputs.rejected)), generator)
        return self.loss(at, generator)

    def _per_row(self, value: Tensor, mask: Tensor) -> Tensor:
        """The values of a loss on single answers as one number per row, `(rows,)`."""
        if self.loss.needs.unit == "example":
            return value
        return per_row(value[mask] if value.ndim > 1 else value, mask)


def _with_rejected(at: At, rejected_of: Callable[[Outputs], Outputs]) -> At:
    """An `at` that replaces the rejected side of the outputs."""

    def changed(strength: Any, **options: Any) -> Outputs:
        outputs = at(strength, **options)
        if options:  # an inner term that reads states or distributions gets those of the unchanged rows
            return outputs
        chosen, rejected = outputs.chosen, rejected_of(outputs)
        return replace(
            outputs,
            token_logps=torch.cat([chosen.token_logps, rejected.token_logps]),
            mask=torch.cat([chosen.mask, rejected.mask]),
        )

    return changed


def _next(rejected: Outputs) -> Outputs:
    """The rejected answer of the next pair, for each pair; the last one gets the first."""
    if len(rejected.mask) < 2:
        raise ValueError("contrast='unpaired' needs at least 2 pairs in a batch: raise per_device_train_batch_size.")
    return Outputs(rejected.token_logps.roll(-1, dims=0), rejected.mask.roll(-1, dims=0))
