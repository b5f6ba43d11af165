"""`trl.GRPOTrainer` for steering vectors."""

from trl import GRPOTrainer

from .reinforcement_mixin import ReinforcementMixin


class SteeringGRPOTrainer(ReinforcementMixin, GRPOTrainer):
    """`trl.GRPOTrainer` plus a default steering vector (see `ReinforcementMixin`). Data: prompts."""
