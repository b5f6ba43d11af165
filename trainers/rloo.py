"""`trl.RLOOTrainer` for steering vectors."""

from trl import RLOOTrainer

from .reinforcement_mixin import ReinforcementMixin


class SteeringRLOOTrainer(ReinforcementMixin, RLOOTrainer):
    """`trl.RLOOTrainer` plus a default steering vector (see `ReinforcementMixin`). Data: prompts."""
