"""Loss spikes: a rule, and a callback that warns by it or stops."""

from __future__ import annotations

import logging
import statistics
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

_FLOOR = 0.02  # of the median: at convergence losses hardly spread


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
        stop: End training there. The step is already taken; the last checkpoint is from before it.

    Raises:
        ValueError: a factor that is not above 0, or `least` not within 2 and `window`.
    """

    def __init__(self, factor: float = 10.0, window: int = 50, least: int = 10, stop: bool = False) -> None:
        if not 0 < factor < float("inf"):
            raise ValueError(f"factor={factor!r} must be a finite number above 0.")
        if not 2 <= least <= window:
            raise ValueError(f"least={least!r} must be within 2 and window={window!r}.")
        self.factor, self.window, self.least, self.stop = factor, window, least, stop

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Trainer event: something was logged."""
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if "loss" not in (logs or {}) or len(losses) <= self.least:
            return
        *before, now = losses[-self.window - 1 :]
        limit = spike_limit(before, self.factor)
        if not now > limit:  # NaN is no spike: it is an error of its own
            return
        if state.is_world_process_zero:
            logger.warning(
                "Loss spike at step %d: %.4g, above %.4g (median of the %d logged before: %.4g). Lower the learning "
                "rate, raise warmup_steps, or look at the rows of this step.",
                state.global_step, now, limit, len(before), statistics.median(before),
            )  # fmt: skip
        if self.stop:
            control.should_training_stop, control.should_save = True, False


def spike_limit(losses: list[float], factor: float) -> float:
    """The loss above which the next one is a spike."""
    median = statistics.median(losses)
    spread = statistics.median(abs(loss - median) for loss in losses)
    return median + factor * max(1.4826 * spread, _FLOOR * abs(median))
