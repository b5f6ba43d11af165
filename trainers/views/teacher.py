"""The example as another model answers it: the good and the bad teacher of RAHF (Liu et al. 2312.15997, section 3).

    good, bad = (get_view("teacher", model=teacher) for teacher in (trained_on_chosen, trained_on_rejected))
    SteeringDPOTrainer(..., loss="lorra", views={"good": good, "bad": bad})

A single teacher that was trained with instructions (RAHF's single model) gets the same instructions here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from ._base import Row, View
from .instruction import Instruction, Where


@dataclass(frozen=True)
class Teacher(View):
    """The outputs of a frozen model on the example, in place of the reference's.

    Args:
        model: A causal language model with the trained model's tokens and width; to share its weights,
            `share_weights(model)` with its own adapter.
        instruction: A text in the teacher's prompts.
        where: Place of that text, as in the view `instruction`.

    Raises:
        TypeError: `model` is not a model.
        ValueError: the place is unknown.
    """

    model: nn.Module = field(repr=False)
    instruction: str = ""
    where: Where = "before"

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model={self.model!r:.100} must be a model, such as PeftModel.from_pretrained(...).")
        Instruction(self.instruction or "none", self.where)

    @property
    def teacher(self) -> nn.Module:
        """The teacher."""
        return self.model

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Put the instruction, if there is one, into the rows' prompts."""
        return Instruction(self.instruction, self.where)(rows) if self.instruction else list(rows)
