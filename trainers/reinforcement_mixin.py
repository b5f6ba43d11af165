"""The mixin of the trainers for reinforcement learning, which keep the loss of their parents."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from ..adapters import SteeringVectorConfig
from .arguments import check_ranges
from .callbacks.announcement import Announcement
from .callbacks.finite import NonFiniteError
from .callbacks.vector_stats import VectorStats
from .construction import DEFAULT
from .initial_vectors import fill_missing_vectors, to_fp32
from .rates import agree_on_units, check_rate
from .vector_mixin import VectorMixin

logger = logging.getLogger(__name__)
_EQUAL_REWARDS = 5  # logs in a row


class RewardError(ValueError):
    """Raised when a reward function returns something that is not a reward; the message names it."""


class ReinforcementMixin(VectorMixin):
    """A trainer for reinforcement learning that trains steering vectors, or any PEFT adapter.

    Sampling, rewards and loss are the parent's. What is added: a default vector, learning rates in units of the
    residual stream, vectors in fp32, their norms in the logs, and errors if nothing would be trained.

    Args:
        peft_config: The adapter to train. Left out: `SteeringVectorConfig()`, or nothing if the model already is a
            `PeftModel`. None: no adapter (full finetuning).
        vector_learning_rate: Learning rate of steering vectors, in units of the residual stream. None:
            `learning_rate`, or 1e-3 if that is left at its class's default.

    Raises:
        ValueError: nothing is trainable, or a vector cannot be trained or sampled in this way.
    """

    # what callbacks and cards read of every trainer of this package
    loss = None
    takes_pairs = None
    inductive_biases = []

    def __init__(
        self,
        *args: Any,
        peft_config: PeftConfig | None = DEFAULT,
        vector_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        check_rate(vector_learning_rate)
        parent = super().__init__
        bound = inspect.signature(parent).bind_partial(*args, **kwargs)
        given = bound.arguments
        check_ranges(given.get("args"), but=("beta",))  # here the weight of a KL divergence, which may be 0
        # The adapter is that of the model, the one that was given, or a default vector.
        model = given.get("model")
        if peft_config is DEFAULT:
            peft_config = None if isinstance(model, PeftModel) else SteeringVectorConfig()
        _check_vectors(model, peft_config, given.get("args"))
        if peft_config is not None:
            given["peft_config"] = copy.deepcopy(peft_config)  # injection writes the resolved layers into it
        if (rewards := given.get("reward_funcs")) is not None:
            given["reward_funcs"] = [_checked(f) for f in rewards] if isinstance(rewards, list) else _checked(rewards)
        self.vector_learning_rate = vector_learning_rate
        parent(*bound.args, **bound.kwargs)
        _check_trainable(self.model)
        # TRL rounds adapters to the model's precision
        to_fp32(self.model)
        for callback in (Announcement(self._run), VectorStats(self._run), EqualRewards()):
            self.add_callback(callback)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train like the parent, after preparing the vectors."""
        agree_on_units(self._run)
        fill_missing_vectors(self._run)
        for callback in self.steering_callbacks():
            callback.before_train(self._run)
        return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on a micro-batch like the parent, and refuse a loss that is NaN or infinite."""
        loss = super().training_step(*args, **kwargs)
        if not math.isfinite(float(loss)):
            raise NonFiniteError(
                f"The loss is {float(loss)} at step {self.state.global_step + 1}. Lower the learning rate, or set "
                "max_grad_norm."
            )
        return loss


class EqualRewards(TrainerCallback):
    """Warns if, in several logs in a row, all completions of every group get the same reward: the advantage is 0."""

    def __init__(self) -> None:
        self.logs = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Count the logs in a row in which no group has different rewards."""
        share = (logs or {}).get("frac_reward_zero_std")
        if share is None or not state.is_world_process_zero:
            return
        self.logs = self.logs + 1 if share >= 1 else 0
        if self.logs == _EQUAL_REWARDS:
            logger.warning(
                "In %d logs in a row, all completions of a prompt got the same reward, so nothing is learned from "
                "them. Use a finer-grained reward, a higher temperature, or more num_generations.",
                _EQUAL_REWARDS,
            )


def _check_vectors(model: Any, config: PeftConfig | None, args: Any) -> None:
    """Refuse steering vectors that these trainers do not support.

    Raises:
        ValueError: the message names the switch or argument.
    """
    configs = [*model.peft_config.values()] if isinstance(model, PeftModel) else []
    vectors = [c for c in [*configs, config] if isinstance(c, SteeringVectorConfig)]
    if vectors and getattr(args, "use_vllm", False):
        raise ValueError(
            "use_vllm=True: TRL merges an adapter into the weights that it sends to vLLM, and a steering vector "
            "cannot be merged. Set use_vllm=False."
        )
    for each in vectors:
        if each.positions != "all":
            raise ValueError(
                f"positions={each.positions!r}: TRL does not say where prompts end when it scores completions. Use "
                "positions='all'."
            )
    if isinstance(config, SteeringVectorConfig) and config.init_from_data:
        raise ValueError(
            f"init={config.init!r} is computed from pairs (chosen, rejected), but reinforcement learning only has "
            "prompts. Use init='zeros', or continue a saved vector."
        )


def _check_trainable(model: nn.Module) -> None:
    """Raise a ValueError if no parameter is trainable."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "No parameter of the model is trainable, so training would change nothing. Load the adapter with "
            "PeftModel.from_pretrained(..., is_trainable=True), or leave peft_config out."
        )


def _checked(function: Any) -> Any:
    """Wrap a reward function to check that it returns finite numbers, or None for completions it does not score.

    Models and names of models are returned unchanged.
    """
    if isinstance(function, str | nn.Module) or not callable(function):
        return function
    name = getattr(function, "__name__", type(function).__name__)

    def check(rewards: list[Any]) -> list[Any]:
        for i, reward in enumerate(rewards):
            if reward is not None and not math.isfinite(reward):
                raise RewardError(
                    f"Reward function {name!r} returned {reward!r} for completion {i}. A reward must be a finite "
                    "number, or None where the function does not apply."
                )
        return rewards

    if inspect.iscoroutinefunction(function):
        return functools.update_wrapper(_then_async(function, check), function)

    def checked(*args: Any, **kwargs: Any) -> list[Any]:
        rewards: Any = function(*args, **kwargs)
        return check(rewards)

    return functools.update_wrapper(checked, function)


def _then_async(function: Any, check: Callable[[list[Any]], list[Any]]) -> Any:
    async def checked(*args: Any, **kwargs: Any) -> list[Any]:
        return check(await function(*args, **kwargs))

    return checked
