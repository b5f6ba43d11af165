"""Loss spikes: a rule to detect them, and a callback that warns of them, or stops after or before the step."""

from __future__ import annotations

import logging
import statistics
from typing import Any, Literal

from torch import Tensor

from ..types import SteeringRun
from .bad_examples import largest
from .base import SteeringCallback

logger = logging.getLogger(__name__)

_FLOOR = 0.02  # of the median: at convergence losses hardly vary
_ADVICE = "Lower the learning rate, raise warmup_steps, or look at the rows of this step."


class LossSpikeError(RuntimeError):
    """Raised before a step whose loss is a spike, with `LossSpikes(stop="before")`."""


class LossSpikes(SteeringCallback):
    """Warns when a logged training loss jumps, for any Trainer: `trainer.add_callback(LossSpikes())`.

    The rule, on the logged losses before it (so set `logging_steps=1` to see every step):

        loss > m + factor · max(1.4826 · MAD, 0.02 |m|)

    with m their median and MAD the median of their distances from it. It is opt-in: what counts as a spike depends on
    the task, and only the reader can decide whether to continue. It keeps no state, so a resumed run warns as an
    uninterrupted one does.

    Args:
        factor: How many robust standard deviations are a spike.
        window: How many logged losses the next one is compared with.
        least: How many logged losses there must be before the rule applies.
        stop: True: end training after that step; the last checkpoint is from before it. `"before"` (trainers of this
            package): raise before the step is taken, name the rows and the parameter it came from, and keep the state
            before it in `<output_dir>/last-good`, as for values that are not finite.

    Raises:
        ValueError: `factor` is not above 0, `least` is not within 2 and `window`, or `stop` is unknown; when training
            begins, `stop="before"` is set on a Trainer that cannot do it.
        LossSpikeError: there is a spike, with `stop="before"`.
    """

    def __init__(
        self, factor: float = 10.0, window: int = 50, least: int = 10, stop: bool | Literal["before"] = False
    ) -> None:
        if not 0 < factor < float("inf"):
            raise ValueError(f"factor={factor!r} must be a finite number above 0.")
        if not 2 <= least <= window:
            raise ValueError(f"least={least!r} must be within 2 and window={window!r}.")
        if stop not in (True, False, "before"):
            raise ValueError(f"stop={stop!r} must be True, False or 'before'.")
        self.factor, self.window, self.least, self.stop = factor, window, least, stop
        self.trainer: SteeringRun | None = None  # a trainer of this package, when it trains
        self.step_loss: Tensor | float = 0.0  # of the current step so far, over all processes

    def before_train(self, trainer: SteeringRun) -> None:
        """Remember the trainer."""
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to add up the step's loss."""
        self.step_loss = 0.0

    def on_micro_step(self, losses: Tensor) -> None:
        """Add a micro-batch's loss, `(processes,)`."""
        self.step_loss = self.step_loss + losses.mean()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise an error if this trainer cannot stop before a step."""
        if self.stop != "before":
            return
        if self.trainer is None:
            raise ValueError(
                "LossSpikes(stop='before') needs SteeringTrainer, SteeringSFTTrainer or SteeringDPOTrainer with an "
                "adapter or a loss: other trainers do not give the loss before the step. Use stop=True."
            )
        if self.trainer.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed takes its step within the backward pass, so nothing can stop before it. Use stop=True."
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop before the step: gradients are computed, parameters not yet changed."""
        if self.stop != "before" or self.trainer is None:
            return
        losses, loss = _logged(state), float(self.step_loss)
        limit = self._limit(losses)
        if limit is not None and loss > limit:
            message = self._message(state.global_step + 1, loss, limit, losses)
            folder = self.trainer.save_last_good()
            saved = f"The state after step {state.global_step} is saved in {folder}."
            raise LossSpikeError(f"{message} {largest(self.trainer)} {saved} {_ADVICE}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Warn of a spike, and stop if that was requested."""
        *before, now = _logged(state) or [0.0]
        limit = self._limit(before)
        # NaN is not a spike but an error, raised elsewhere
        if "loss" not in (logs or {}) or limit is None or not now > limit:
            return
        if state.is_world_process_zero:
            logger.warning("%s %s", self._message(state.global_step, now, limit, before), _ADVICE)
        if self.stop:
            control.should_training_stop, control.should_save = True, False

    def _limit(self, losses: list[float]) -> float | None:
        return spike_limit(losses[-self.window :], self.factor) if len(losses) >= self.least else None

    def _message(self, step: int, loss: float, limit: float, losses: list[float]) -> str:
        last = losses[-self.window :]
        return (
            f"Loss spike at step {step}: {loss:.4g}, above {limit:.4g} (median of the {len(last)} logged before: "
            f"{statistics.median(last):.4g})."
        )


def _logged(state: Any) -> list[float]:
    return [entry["loss"] for entry in state.log_history if "loss" in entry]


def spike_limit(losses: list[float], factor: float) -> float:
    """The loss above which the next one is a spike."""
    median = statistics.median(losses)
    spread = statistics.median(abs(loss - median) for loss in losses)
    return median + factor * max(1.4826 * spread, _FLOOR * abs(median))
