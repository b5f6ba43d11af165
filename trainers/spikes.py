"""Loss spikes: a rule, and a callback that warns by it, or stops behind or before the step."""

from __future__ import annotations

import logging
import statistics
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainerCallback

from ._culprit import largest

if TYPE_CHECKING:
    from ._mixin import SteeringMixin

logger = logging.getLogger(__name__)

_FLOOR = 0.02  # of the median: at convergence losses hardly spread
_ADVICE = "Lower the learning rate, raise warmup_steps, or look at the rows of this step."


class LossSpikeError(RuntimeError):
    """The loss of a step is a spike, and `LossSpikes(stop="before")` was asked for."""


class LossSpikes(TrainerCallback):
    """Warns when a logged training loss jumps, for any Trainer: `trainer.add_callback(LossSpikes())`.

    The rule, on the logged losses before it (so set `logging_steps=1` to see every step):

        loss > m + factor · max(1.4826 · MAD, 0.02 |m|)

    with m their median and MAD the median of their distances from it. It is opt-in: what is a spike depends on the
    task, and only the reader knows whether to go on. It keeps no state, so a resumed run warns as the straight one.

    Args:
        factor: How many robust standard deviations are a spike.
        window: How many logged losses it is compared with.
        least: How many there must be before the rule is used.
        stop: True: end training behind that step, which is taken; the last checkpoint is from before it. `"before"`
            (trainers of this package): raise before the step is taken, with the rows and the parameter it came from,
            and keep the state before it in `<output_dir>/last-good`, as for values that are not finite.

    Raises:
        ValueError: a factor that is not above 0, `least` not within 2 and `window`, or another `stop`; when training
            begins, `stop="before"` on a Trainer that cannot do it.
        LossSpikeError: a spike, with `stop="before"`.
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
        self.trainer: SteeringMixin | None = None
        """Whose steps are looked at before they are taken: a trainer of this package says so when it trains."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer event: refuse what could not be kept."""
        if self.stop != "before":
            return
        if self.trainer is None:
            raise ValueError(
                "LossSpikes(stop='before') needs SteeringTrainer, SteeringSFTTrainer or SteeringDPOTrainer with an "
                "adapter or a loss: other trainers do not say the loss before the step. Use stop=True."
            )
        if self.trainer.is_deepspeed_enabled:
            raise ValueError("DeepSpeed takes its step within backward, nothing can stop before it. Use stop=True.")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer event: gradients are there, parameters not yet changed."""
        if self.stop != "before" or self.trainer is None:
            return
        losses, loss = _logged(state), float(self.trainer.step_loss)
        limit = self._limit(losses)
        if limit is not None and loss > limit:
            said = self._says(state.global_step + 1, loss, limit, losses)
            folder = self.trainer.save_last_good()
            kept = f"The state after step {state.global_step} is kept in {folder}."
            raise LossSpikeError(f"{said} {largest(self.trainer)} {kept} {_ADVICE}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Trainer event: something was logged."""
        *before, now = _logged(state) or [0.0]
        limit = self._limit(before)
        if "loss" not in (logs or {}) or limit is None or not now > limit:  # NaN is no spike: an error of its own
            return
        if state.is_world_process_zero:
            logger.warning("%s %s", self._says(state.global_step, now, limit, before), _ADVICE)
        if self.stop:
            control.should_training_stop, control.should_save = True, False

    def _limit(self, losses: list[float]) -> float | None:
        return spike_limit(losses[-self.window :], self.factor) if len(losses) >= self.least else None

    def _says(self, step: int, loss: float, limit: float, losses: list[float]) -> str:
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
