"""The recommended setting, the reason for it, and whether the direction is reliable.

Among the settings that keep neutral text within the limits, it is the gentlest that is within one standard error of
the best (Breiman et al. 1984, section 3.4.3) and more than one ahead of the base model: the best of many settings
measured on a few rows is the best partly by luck, and strength costs fluency.

Slopes are least-squares slopes, per held-out example, of the margin against the strength from the base model up to the
setting ("steerability", Tan et al. 2407.12404). A positive mean can hide examples that move the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import sem

from steertune.recipes.lab.intervals import share_interval
from steertune.recipes.lab.rows import BASE, Record
from steertune.recipes.sweeping.settings import Limits

UNRELIABLE = 0.25
"""A direction that moves at least this share of held-out examples the wrong way is called unreliable."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Setting:
    """A place at one strength.

    Attributes:
        record: The observations of the model with a vector at this place.
        strength: Strength of the vector.
    """

    record: Record
    strength: float

    @property
    def site(self) -> str:
        """The site in the block."""
        return self.record.facts["site"]

    @property
    def layer(self) -> int:
        """The block's index."""
        return self.record.facts["layer"]

    @property
    def base(self) -> Setting:
        """The base model on the same rows."""
        return Setting(self.record, 0.0)

    def value(self, measure: str) -> float:
        """A measure's mean; NaN if it was not measured."""
        return self.record.value(measure, self.strength)

    def rows(self, measure: str) -> NDArray[np.float64]:
        """A measure's value for every example."""
        return self.record.seen(self.strength)[measure]

    @property
    def is_scored(self) -> bool:
        """Whether every generated answer was scored."""
        return "behaviour" in self.record.seen(self.strength) and not np.isnan(self.rows("behaviour")).any()


def settings_of(records: Sequence[Record]) -> list[Setting]:
    """The settings of all places; the base model is not one."""
    return [Setting(record, float(at)) for record in records for at in record.observations if at != BASE]


@dataclass(frozen=True)
class Choice:
    """A recommendation.

    Attributes:
        setting: The recommended setting; None: no setting is better than the base model.
        reason: The reason, in words.
    """

    setting: Setting | None
    reason: str


@dataclass(frozen=True)
class Reliability:
    """How evenly a setting works.

    Attributes:
        slopes: Nats per unit of strength, for each held-out example.
        wrong: How many examples it moves the wrong way.
        share: The share of such examples.
        low: Lower end of its 95 % interval (Wilson).
        high: Upper end of it.
    """

    slopes: list[float]
    wrong: int
    share: float
    low: float
    high: float

    @property
    def unreliable(self) -> bool:
        """Whether too many examples move the wrong way for the mean effect to predict the next one."""
        return self.share >= UNRELIABLE


def choose(settings: Sequence[Setting], limits: Limits) -> Choice:
    """Recommend one of the settings that were measured on validation rows."""
    measure = deciding(settings)
    forward = [setting for setting in settings if setting.strength > 0]
    gentle = [setting for setting in forward if not excesses(setting, limits)]
    counted = f"{len(gentle)} of {len(forward)} settings leave neutral text within the limits ({_limits(limits)})"
    if not gentle:
        return Choice(None, f"No setting: {counted}. Try smaller strengths.")
    best = max(gentle, key=lambda setting: (setting.value(measure), -setting.value("kl")))
    base = best.base
    top = f"{place(best)} has the best {_NAMES[measure]} on validation rows ({best.value(measure):.3f})"
    near = [
        setting
        for setting in gentle  # as good as the best, and better than nothing
        if _within_one_error(best, setting, measure)
        and (setting is best or not _within_one_error(setting, base, measure))
    ]
    if _within_one_error(best, base, measure):
        return Choice(
            None,
            f"No setting: {counted}, and of these {top}, which is within one standard error of the base model "
            f"({base.value(measure):.3f}). More validation rows, other layers or another direction could show more.",
        )
    chosen = min(near, key=lambda setting: (setting.value("kl"), abs(setting.strength)))
    if len(near) == 1:
        return Choice(
            chosen,
            f"{counted}. Of these {top}, and no other is both within one standard error of it and ahead of the base "
            "model by more than that.",
        )
    here = "it has itself" if chosen is best else f"{place(chosen)} ({chosen.value(measure):.3f}) has"
    return Choice(
        chosen,
        f"{counted}. Of these {top}, and {len(near) - 1} more are within one standard error of it and ahead of the "
        f"base model by more than that; among them "
        f"{here} the least KL to the base model ({chosen.value('kl'):.3f} nats a token).",
    )


def deciding(settings: Sequence[Setting]) -> str:
    """The measure for choosing: the behaviour score if every generated answer was scored, else pair accuracy."""
    scored = all(setting.is_scored and setting.base.is_scored for setting in settings)
    return "behaviour" if settings and scored else "accuracy"


def excesses(setting: Setting, limits: Limits) -> list[str]:
    """The limits on neutral text that a setting exceeds, in words; empty if none."""
    if not all(np.isfinite(setting.rows(name)).all() for name in ("kl", "perplexity", "margin")):
        return ["its log-probabilities are not finite"]
    kl, repetition = setting.value("kl"), setting.value("neutral_repetition")
    perplexity, reasons = setting.value("perplexity") / setting.base.value("perplexity"), []
    if kl > limits.kl:
        reasons.append(f"KL {kl:.2g}")
    if perplexity > limits.perplexity:
        reasons.append(f"perplexity × {perplexity:.2g}")
    # repetition is NaN if no generated answer is long enough
    if repetition > np.nan_to_num(setting.base.value("neutral_repetition")) + limits.repetition:
        reasons.append(f"repetition {repetition:.0%}")
    return reasons


def reliability(setting: Setting) -> Reliability:
    """Per-example slopes of the margin over the strengths of a setting's place, from 0 up to that of the setting."""
    on_line = [
        other
        for other in settings_of([setting.record])
        if other.strength * setting.strength > 0 and abs(other.strength) <= abs(setting.strength)
    ]
    strengths = np.array([0.0, *(other.strength for other in on_line)])
    margins = np.array([setting.base.rows("margin"), *(other.rows("margin") for other in on_line)])
    slopes = np.polyfit(strengths, margins, 1)[0]
    wrong = (slopes < 0).tolist()
    share = share_interval(wrong, "wilson")
    return Reliability(slopes.tolist(), sum(wrong), share.estimate, share.low, share.high)


def place(setting: Setting) -> str:
    """A setting in words."""
    site = "" if setting.site == "block" else f" ({setting.site})"
    return f"layer {setting.layer}{site} at strength {setting.strength:g}"


_NAMES = {"behaviour": "behaviour score", "accuracy": "pair accuracy"}


def _within_one_error(best: Setting, other: Setting, measure: str) -> bool:
    """Whether the best is ahead by at most one standard error of the paired difference."""
    ahead = best.rows(measure) - other.rows(measure)
    # a difference on one of n examples equals one standard error, except for rounding
    return bool(ahead.mean() <= (sem(ahead) if len(ahead) > 1 else 0.0) + _ROUNDING)


def _limits(limits: Limits) -> str:
    return (
        f"KL up to {limits.kl:g}, perplexity up to {limits.perplexity:g} times the base's, repetition up to "
        f"{limits.repetition:.0%} above the base's"
    )
