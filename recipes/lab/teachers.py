"""Teachers: models trained on the same examples first, whose states or distributions an arm then learns (RAHF).

    [teachers.good]                # trained on the chosen answers
    chosen = ""

    [teachers.bad]                 # trained on the rejected answers
    rejected = ""

    [views.good]
    name = "teacher"
    model = "good"                 # what the loss sees at its view "good" is what this teacher says

A text in place of "" stands in front of these answers' prompts: one teacher may see both answers, each behind an
instruction of its own, and is asked with the same instructions (`[views.good] instruction = ...`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from pydantic import BaseModel, model_validator
from torch import nn

from steertune.trainers import get_view, share_weights

if TYPE_CHECKING:
    from steertune.recipes.lab.arm import Arm

_LORA = {"type": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


class TeacherTable(BaseModel, extra="forbid"):
    """`[teachers.NAME]`: what a teacher is trained on, with cross-entropy, and how."""

    chosen: str | None = None
    """What stands in front of the prompts of chosen answers; left out: it does not see them."""
    rejected: str | None = None
    """The same for rejected answers."""
    adapter: dict[str, Any] = _LORA
    trainer: dict[str, Any] = {}
    """Settings that differ from the arm's `[trainer]`."""

    @model_validator(mode="after")
    def _sees_something(self) -> TeacherTable:
        if self.chosen is None and self.rejected is None:
            raise ValueError('a teacher learns from answers: chosen = "", rejected = "", or both')
        return self


def train_teachers(
    arm: Arm, model: Any, tokenizer: Any, rows: Dataset, folder: Path, quiet: Mapping[str, Any]
) -> dict[str, nn.Module]:
    """The arm's teachers by name, each an adapter on the base model's own weights.

    They train as the arm's tables say, whatever the tuning of the arm itself tries.

    Args:
        arm: Whose teachers.
        model: The base model.
        tokenizer: Its tokenizer.
        rows: The arm's examples.
        folder: For checkpoints.
        quiet: Training arguments of the arm's run that say nothing about learning, for saving and logging.
    """
    from steertune.recipes.lab.training import fit, make_trainer

    teachers = {}
    tables: dict[str, Any] = dict(arm.teachers)
    for name, table in tables.items():
        own = arm.model_copy(
            update={
                "name": f"{arm.name}/{name}",
                "adapter": table.adapter,
                "loss": {"name": "cross_entropy"},
                "trainer": {**arm.trainer, **table.trainer},
                "views": {},
                "teachers": {},
                "biases": {},
            }
        )
        home = folder / "teachers" / name
        home.mkdir(parents=True, exist_ok=True)
        trainer = make_trainer(own, share_weights(model), tokenizer, answers(rows, table), home, **quiet)
        fit(trainer, home)
        teachers[name] = trainer.model.eval().requires_grad_(False)
    return teachers


def answers(rows: Dataset, table: TeacherTable) -> Dataset:
    """What a teacher is trained on: prompts and completions.

    Raises:
        ArmError: the examples are no pairs with prompts.
    """
    from steertune.recipes.lab.arm import ArmError

    if not {"prompt", "chosen", "rejected"} <= set(rows.column_names):
        raise ArmError(f"[teachers] learn from pairs with a prompt; the data have {rows.column_names}.")
    seen = []
    for side, text in (("chosen", table.chosen), ("rejected", table.rejected)):
        if text is not None:
            shown = get_view("instruction", text=text)(rows.to_list()) if text else rows.to_list()
            seen += [{"prompt": row["prompt"], "completion": row[side]} for row in shown]
    return Dataset.from_list(seen)
