"""Train an arm on generated answers instead of the task's: `[answers]`.

    [answers]
    rejected = "sample"           # the base model's answer to the prompt

    [answers]
    chosen = "instructed"         # its answer when instructed to show the behaviour (on-policy answers)
    rejected = "opposed"          # its answer when instructed to do the opposite

The instructions are those of the task's `behaviour.toml`, or `positive` and `negative` of this table. They are put
before a prompt only while its answer is generated: the arm is trained on the prompts as they are.

The task's rejected answers and those of another prompt (`data.pairing = "shuffled"`) need no table, and neither does
twice the number of chosen answers without any rejected ones (`loss.contrast = "none"`, `data.times = 2`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from datasets import Dataset
from pydantic import Field

from steertune.recipes.lab.behaviours import read_behaviour
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.generation import generate
from steertune.recipes.lab.ingredients import ArmLike, Ingredient, Training
from steertune.recipes.lab.progress import track
from steertune.trainers import get_view

_ROWS = 16  # prompts that are answered in one batch
_ELSEWHERE = "remove the table, or use the arm in train, in a grid or in a sweep."


class Answers(Ingredient):
    """`[answers]`: which answers of the base model replace those of the task."""

    order: ClassVar[int] = 15  # after [augmentation], before [teachers]
    refused_by: ClassVar[Mapping[str, str]] = {
        "distill": f"distill makes the answers itself; {_ELSEWHERE}",
        "gradients": "gradients compares losses on the task's own answers; remove the table.",
        "contrast_prompts": f"contrast_prompts makes the answers itself; {_ELSEWHERE}",
    }

    chosen: Literal["written", "instructed"] = "written"
    """`instructed`: the base model's answer when instructed to show the behaviour."""
    rejected: Literal["written", "sample", "opposed"] = "written"
    """`sample`: the base model's answer to the prompt; `opposed`: its answer when instructed to do the opposite."""
    positive: str = ""
    """Instruction that asks for the behaviour; by default the task's."""
    negative: str = ""
    """Instruction that asks for the opposite; by default the task's."""
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Sampling temperature; 0 is greedy."""
    new_tokens: int = Field(default=40, ge=1)
    """Maximum length of an answer, in tokens."""

    def check(self, arm: ArmLike) -> None:
        """Refuse options that would change nothing, and missing instructions."""
        if self and self.chosen == self.rejected == "written":
            raise ArmError(
                "[answers] with the task's own answers on both sides changes nothing. Set "
                'answers.rejected = "sample" or "opposed", or answers.chosen = "instructed".'
            )
        for source in (self.chosen, self.rejected):
            self._instruction(arm.data.name, source)

    def apply(self, training: Training) -> None:
        """Generate the answers, which are the same for every training on the same prompts."""
        if not self:
            return
        sides = {"chosen": self.chosen, "rejected": self.rejected}
        rows, columns = training.rows, training.rows.column_names
        if missing := {"prompt", *(side for side in sides if sides[side] != "written")} - {*columns}:
            raise ArmError(f"[answers] needs the columns {sorted(missing)}; the data have {columns}.")
        notes = []
        for number, (side, source) in enumerate(sides.items()):
            if source != "written":
                rows = self._answered(training, rows, side, source, number)
                notes.append(f"The {side} answers are the base model's own ({source}).")
        training.rows, training.notes["answers"] = rows, " ".join(notes)

    def _answered(self, training: Training, rows: Dataset, side: str, source: str, number: int) -> Dataset:
        """The rows with generated answers on one side."""
        instruction = self._instruction(training.arm.data.name, source)
        key = ("answers", source, instruction, self.temperature, self.new_tokens, training.seed, *map(repr, rows))
        if key not in training.cache:
            view = get_view("instruction", text=instruction) if instruction else None
            prompts = [row["prompt"] for row in (view(rows.to_list()) if view else rows.to_list())]
            texts: list[str] = []
            for start in track(range(0, len(prompts), _ROWS), f"{side} answers"):
                texts += generate(
                    training.model,
                    training.tokenizer,
                    prompts[start : start + _ROWS],
                    self.new_tokens,
                    temperature=self.temperature,
                    seed=training.seed * 100_003 + number * 1_009 + start,
                )
            training.cache[key] = texts
        texts = training.cache[key]
        chat = not isinstance(rows[0][side], str)
        return rows.map(
            lambda _, i: {side: [{"role": "assistant", "content": texts[i]}] if chat else texts[i]}, with_indices=True
        )

    def _instruction(self, task: str, source: str) -> str:
        """The instruction that is put before the prompts when these answers are generated."""
        if source in ("written", "sample"):
            return ""
        name = "positive" if source == "instructed" else "negative"
        instruction = getattr(self, name)
        opposites = read_behaviour(task).opposites
        if not instruction and opposites is None:
            raise ArmError(
                f"[answers] asks for {source} answers, but the task {task!r} has no instructions for that (no "
                f"[opposites] in a behaviour.toml). Set answers.{name}."
            )
        return instruction or getattr(opposites, name)
