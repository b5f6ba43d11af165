"""Teachers: models trained on the same examples first, whose states or distributions an arm then learns (RAHF).

    [teachers.good]                # trained on the chosen answers
    chosen = ""

    [teachers.bad]                 # trained on the rejected answers
    rejected = ""

    [views.good]
    name = "teacher"
    model = "good"                 # the loss's view "good" is the output of this teacher

A text in place of "" is put before the prompts of these answers: one teacher can be trained on both answers, each with
its own instruction, and is then used with the same instructions (`[views.good] instruction = ...`).
"""

from __future__ import annotations

from typing import Any, ClassVar

from datasets import Dataset
from pydantic import BaseModel, ValidationError, model_validator

from steertune.recipes.lab.files import ArmError, check_name, nearest, reasons
from steertune.recipes.lab.ingredients import ArmLike, Named, Training
from steertune.recipes.lab.ingredients.views import Views
from steertune.trainers import get_view

_LORA = {"type": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


class TeacherTable(BaseModel, extra="forbid", strict=True):
    """`[teachers.NAME]`: the answers that a teacher is trained on (with cross-entropy), and its settings."""

    chosen: str | None = None
    """Text before the prompts of chosen answers; if left out, it is not trained on them."""
    rejected: str | None = None
    """Text before the prompts of rejected answers; if left out, it is not trained on them."""
    adapter: dict[str, Any] = _LORA
    trainer: dict[str, Any] = {}
    """Settings that differ from the arm's `[trainer]`."""

    @model_validator(mode="after")
    def _sees_something(self) -> TeacherTable:
        if self.chosen is None and self.rejected is None:
            raise ValueError('a teacher learns from answers: set chosen = "", rejected = "", or both')
        return self


class Teachers(Named):
    """`[teachers.NAME]`: models that are trained before the arm."""

    order: ClassVar[int] = 20

    def teachers(self) -> dict[str, TeacherTable]:
        """The teachers by name.

        Raises:
            ArmError: a table has an unknown key or a value of the wrong type.
        """
        teachers = {}
        for name, table in self.tables.items():
            if unknown := [key for key in table if key not in TeacherTable.model_fields]:
                best = nearest(unknown[0], [*TeacherTable.model_fields])
                raise ArmError(f"Unknown key {unknown[0]!r} in [teachers.{name}].{best}")
            try:
                teachers[name] = TeacherTable(**table)
            except (ValidationError, TypeError) as error:
                why = reasons(error) if isinstance(error, ValidationError) else str(error)
                raise ArmError(f"[teachers.{name}]: {why}") from error
        return teachers

    def check(self, arm: ArmLike) -> None:
        """Refuse teachers that no view uses, or that would be trained with another method's learning rate."""
        views = arm.ingredients.get("views")
        tables = views.tables if isinstance(views, Views) else {}
        shown = {table.get("model", view) for view, table in tables.items() if table.get("name", view) == "teacher"}
        for name, table in self.teachers().items():
            check_name("teacher", name)  # it names a folder
            if name not in shown:
                raise ArmError(
                    f"No view uses the teacher of [teachers.{name}]. Add one: "
                    f'[views.good] name = "teacher", model = "{name}".'
                )
            try:
                arm.peft_config(table.adapter)
            except ArmError as error:
                raise ArmError(f"[teachers.{name}]: {error}") from error
            if table.adapter.get("type") != arm.adapter.get("type") and "learning_rate" not in table.trainer:
                raise ArmError(
                    f"[teachers.{name}] trains {table.adapter.get('type')!r} at the learning rate of the arm's "
                    f"{arm.adapter.get('type')!r}. Set teachers.{name}.trainer.learning_rate."
                )

    def apply(self, training: Training) -> None:
        """Train the teachers; the views that use them are made next."""
        models = {
            name: training.train(
                name, {"adapter": table.adapter, "trainer": table.trainer}, examples_of(training.rows, table)
            )
            for name, table in self.teachers().items()
        }
        training.options["teachers"] = models

    def key(self, arm: ArmLike) -> Any:
        """Every teacher, including the training arguments that it inherits from the arm."""
        return {
            name: {**table.model_dump(), "trainer": {**arm.trainer, **table.trainer}}
            for name, table in self.teachers().items()
        }


def examples_of(rows: Dataset, table: TeacherTable) -> Dataset:
    """The prompts and completions that a teacher is trained on.

    Raises:
        ArmError: the examples are not pairs with prompts.
    """
    if not {"prompt", "chosen", "rejected"} <= set(rows.column_names):
        raise ArmError(f"[teachers] are trained on pairs with a prompt (got the columns {rows.column_names}).")
    examples = []
    for side, text in (("chosen", table.chosen), ("rejected", table.rejected)):
        if text is not None:
            shown = get_view("instruction", text=text)(rows.to_list()) if text else rows.to_list()
            examples += [{"prompt": row["prompt"], "completion": row[side]} for row in shown]
    return Dataset.from_list(examples)
