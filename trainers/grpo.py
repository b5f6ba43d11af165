"""`trl.GRPOTrainer` for steering vectors."""

from __future__ import annotations

from typing import Any

from trl import GRPOTrainer

from .reinforcement_mixin import ReinforcementMixin
from .rollouts import SteeredRollouts


class SteeringGRPOTrainer(ReinforcementMixin, GRPOTrainer):
    """`trl.GRPOTrainer` plus a default steering vector (see `ReinforcementMixin`). Data: prompts.

    With `rollout_func=SteeredRollouts(...)`, completions are sampled under other vectors than the trained one, and the
    loss uses the ratio to the distribution that they were sampled from.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.rollout_func, SteeredRollouts):
            self.rollout_func.start(self)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; completions of `SteeredRollouts` are compared with the model that sampled them."""
        if isinstance(self.rollout_func, SteeredRollouts):
            # TRL's name for the denominator of its ratio
            inputs = {**inputs, "old_per_token_logps": inputs["sampling_per_token_logps"]}
        return super().compute_loss(model, inputs, *args, **kwargs)
