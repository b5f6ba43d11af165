"""`trl.DPOTrainer` for steering vectors."""

from trl import DPOTrainer

from .mixin import SteeringMixin


class SteeringDPOTrainer(SteeringMixin, DPOTrainer):
    """`trl.DPOTrainer` plus a default steering vector and `loss=` (see `SteeringMixin`). Data: preference pairs.

    With `loss=None` the loss is TRL's own, set by `DPOConfig.loss_type`. Every loss of `steertune.losses` works here,
    including cross-entropy (on the chosen answers), so that the arms of a comparison can share trainer and data.
    """

    takes_pairs = True

    def parent_log(self) -> dict[str, list[float]]:
        """The values that `DPOTrainer` has recorded since its last log."""
        return self._metrics["train" if self.model.training else "eval"]  # TRL has no public name for it
