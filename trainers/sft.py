"""`trl.SFTTrainer` for steering vectors."""

from trl import SFTTrainer

from .mixin import SteeringMixin


class SteeringSFTTrainer(SteeringMixin, SFTTrainer):
    """`trl.SFTTrainer` plus a default steering vector and `loss=` (see `SteeringMixin`). Data: demonstrations."""

    takes_pairs = False

    def parent_log(self) -> dict[str, list[float]]:
        """The values that `SFTTrainer` has recorded since its last log."""
        return self._metrics["train" if self.model.training else "eval"]  # TRL has no public name for it
