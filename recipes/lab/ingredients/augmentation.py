"""More examples made of the few: `[augmentation]`, its `name` a file of `recipes/lab/augmentation/`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from steertune.recipes.lab.augmentation import Augmenter, grown, read
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.ingredients import ArmLike, Ingredient, Training

_ELSEWHERE = "remove the table, or use the arm in train, in a grid or in a sweep."


class Augmentation(Ingredient, extra="allow"):
    """`[augmentation]`: how new versions of the examples are made, and `times` how many times as many there are."""

    order: ClassVar[int] = 10
    refused_by: ClassVar[Mapping[str, str]] = {
        "distill": f"distill makes no further examples; {_ELSEWHERE}",
        "gradients": "gradients makes no further examples; remove the table.",
        "contrast_prompts": f"contrast_prompts makes no further examples; {_ELSEWHERE}",
    }

    def augmenter(self) -> tuple[Augmenter, int] | None:
        """What makes the versions, and how many times as many examples there are; None where nothing does."""
        return read(self.model_extra or {})

    def check(self, arm: ArmLike) -> None:
        """Refuse one whose new examples would also mean more training steps."""
        made, steps = self.augmenter(), arm.trainer.get("max_steps", -1)
        if made is not None and made[1] > 1 and not (isinstance(steps, int) and steps >= 0):
            raise ArmError(
                f"[augmentation] makes {made[1]} times as many examples, and trainer.max_steps={steps!r} would train "
                f"on each as often as before, {made[1]} times as many steps. Set trainer.max_steps."
            )

    def apply(self, training: Training) -> None:
        """Add the versions to the training rows; the same ones for every training on the same rows."""
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
