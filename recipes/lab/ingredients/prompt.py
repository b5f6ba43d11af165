"""Arms without training that put a text before every prompt: an instruction, demonstrations, contrast prompts.

    [prompt]
    demonstrations = 4      # number of the arm's training examples to show, drawn anew for every prompt
    fewer = true            # show all of them if there are fewer
    contrast = true         # each with its rejected answer: "Good response: ... Bad response: ..."
    instruction = true      # one of the task's `instructions`, chosen by tuning

Their cost is paid at inference: `prompt_tokens` of a cell is the number of tokens that are added to every request.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

from datasets import Dataset
from pydantic import Field

from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.ingredients import ArmLike, Ingredient
from steertune.recipes.lab.observe import Show, behind
from steertune.trainers import View, get_view

_NOTHING = "such an arm is a prompt, so there is nothing to train. Compare it with others in a grid."


class Prompt(Ingredient):
    """`[prompt]`: what is put before every prompt."""

    refused_by: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("train", "sweep", "distill", "contrast_prompts"), _NOTHING
    )

    demonstrations: int = Field(default=0, ge=0)
    """Number of training examples in front of every prompt."""
    fewer: bool = False
    """Show all examples if the training set has fewer than `demonstrations`."""
    contrast: bool = False
    """Also show the rejected answers of the demonstrations."""
    instruction: bool = False
    """Put an instruction of the task in front of every prompt."""

    def check(self, arm: ArmLike) -> None:
        """Refuse a prompt together with training, and contrast without demonstrations."""
        if self.contrast and not self.demonstrations:
            raise ArmError(
                "prompt.contrast shows demonstrations with their rejected answers. Set prompt.demonstrations."
            )
        if self.fewer and not self.demonstrations:
            raise ArmError("prompt.fewer is about demonstrations. Set prompt.demonstrations.")
        if not self:
            return
        if arm.adapter.get("type") != "none" or arm.trainer.get("max_steps") != 0:
            raise ArmError(
                'An arm with a [prompt] trains nothing. Set adapter.type = "none" and trainer.max_steps = 0.'
            )
        if arm.ingredients.get("augmentation"):
            raise ArmError("An arm with a [prompt] trains nothing, so [augmentation] would make examples for nothing.")

    def show(self, instruction: str, examples: Dataset) -> Show:
        """A function that puts this prompt in front of rows. The demonstrations are drawn from `examples`."""
        if not self:
            return lambda rows: rows
        if self.demonstrations:
            view: View = get_view(
                "demonstrations",
                k=min(self.demonstrations, len(examples)) if self.fewer else self.demonstrations,
                contrast=self.contrast,
                instruction=instruction,
                pool=tuple(examples.to_list()),
            )
        else:
            view = get_view("instruction", text=instruction)
        return partial(behind, view)
