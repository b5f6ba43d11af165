"""The example as another model sees it: the good and the bad teacher of RAHF (Liu et al. 2312.15997, section 3).

    good, bad = (get_view("teacher", model=teacher) for teacher in (trained_on_chosen, trained_on_rejected))
    SteeringDPOTrainer(..., loss="lorra", views={"good": good, "bad": bad})

One teacher that was trained with instructions in front (RAHF's single model) is asked with the same instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from ._base import Row, View
from .instruction import Instruction, Where


@dataclass(frozen=True)
class Teacher(View):
    """What a frozen model says of the example, in place of the reference.

    Args:
        model: A causal language model with the trained model's tokens and width; on the same weights,
            `share_weights(model)` with an adapter of its own.
        instruction: A text in the teacher's prompts.
        where: Where it stands, as in the view `instruction`.

    Raises:
        TypeError: no model.
        ValueError: an unknown place.
    """

    model: nn.Module = field(repr=False)
    instruction: str = ""
    where: Where = "before"

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model={self.model!r}: a teacher is a model, such as PeftModel.from_pretrained(...).")
        Instruction(self.instruction or "none", self.where)

    @property
    def teacher(self) -> nn.Module:
        """The model."""
        return self.model

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """The rows themselves, or with the instruction in their prompts."""
        return Instruction(self.instruction, self.where)(rows) if self.instruction else list(rows)
