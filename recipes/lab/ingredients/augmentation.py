"""More examples made from few: `[augmentation]`, whose `name` is a file of `recipes/lab/augmentation/`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from steertune.recipes.lab.augmentation import Augmenter, grown, read
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.ingredients import ArmLike, Ingredient, Training

_ELSEWHERE = "remove the table, or use the arm in train, in a grid or in a sweep."


class Augmentation(Ingredient, extra="allow"):
    """`[augmentation]`: the method that makes new versions (`name`), and how many times as many examples (`times`)."""

    order: ClassVar[int] = 10
    refused_by: ClassVar[Mapping[str, str]] = {
        "distill": f"distill makes no further examples; {_ELSEWHERE}",
        "gradients": "gradients makes no further examples; remove the table.",
        "contrast_prompts": f"contrast_prompts makes no further examples; {_ELSEWHERE}",
    }

    def augmenter(self) -> tuple[Augmenter, int] | None:
        """The augmenter, and how many times as many examples it makes; None for an empty table."""
        return read(self.model_extra or {})

    def check(self, arm: ArmLike) -> None:
        """Refuse an augmentation that would also increase the number of training steps."""
        made, steps = self.augmenter(), arm.trainer.get("max_steps", -1)
        if made is not None and made[1] > 1 and not (isinstance(steps, int) and steps >= 0):
            raise ArmError(
                f"[augmentation] makes {made[1]} times as many examples, and with trainer.max_steps={steps!r} the "
                f"training would take {made[1]} times as many steps. Set trainer.max_steps."
            )

    def apply(self, training: Training) -> None:
        """Add the versions, which are the same for every training on the same rows, to the training rows."""
        made = self.augmenter()
        if made is None:
            return
        key: Any = ("augmentation", repr(sorted((self.model_extra or {}).items())), training.seed)
        key = (*key, tuple(map(repr, training.rows)))
        if key not in training.cache:
            training.cache[key] = grown(
                training.rows,
                *made,
                seed=training.seed,
                model=training.model,
                tokenizer=training.tokenizer,
                apart=training.held_out,
                near=training.near,
            )
        training.rows, training.notes["augmentation"] = training.cache[key].rows, training.cache[key].note
