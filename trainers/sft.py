"""`trl.SFTTrainer` for steering vectors."""

from trl import SFTTrainer

from ._mixin import SteeringMixin


class SteeringSFTTrainer(SteeringMixin, SFTTrainer):
    """`trl.SFTTrainer` plus a default steering vector and `loss=` (see `SteeringMixin`). Data: demonstrations."""

    takes_pairs = False

    def _forget_evaluations(self) -> None:
        self._metrics["eval"].clear()  # TRL's; it is read and cleared by `log` only, which `predict` does not call
