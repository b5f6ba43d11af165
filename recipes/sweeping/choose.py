"""Which setting is recommended, with its reason in words; and whether the direction can be relied on.

Of the settings that leave neutral text within the limits, the gentlest one that is within one standard error of the
best (Breiman et al. 1984, section 3.4.3) and ahead of the base model by more than one: the best of many settings
measured on a few rows is the best partly by luck, and strength costs fluency.

Slopes are those of least squares, per held-out example, of the margin against the strength from the base model up to
the setting ("steerability", Tan et al. 2407.12404). A mean effect can hide examples that move the other way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, sem

from steertune.recipes.sweeping.settings import Limits

UNRELIABLE = 0.25
"""Share of held-out examples moved the wrong way from which a direction is called unreliable."""
_ROUNDING = 1e-9
Cell = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """A recommendation.

    Attributes:
        cell: The recommended setting; None: the model is best left alone.
        reason: Why, in words.
    """

    cell: Cell | None
    reason: str


@dataclass(frozen=True)
class Reliability:
    """How evenly a setting works.

    Attributes:
        slopes: Nats per unit of strength, one a held-out example.
        wrong: How many examples it moves the wrong way.
        share: The same as a share, and
        low: the lower and
        high: the upper end of its 95 % interval (Wilson).
    """

    slopes: list[float]
    wrong: int
    share: float
    low: float
    high: float

    @property
    def unreliable(self) -> bool:
        """Whether so many examples move the wrong way that the mean effect says little about the next one."""
        return self.share >= UNRELIABLE


def choose(cells: Sequence[Cell], base: Cell, limits: Limits) -> Choice:
    """The recommended setting.

    Args:
        cells: Settings, measured on validation rows.
        base: The base model on the same rows.
        limits: What a setting may do to neutral text.
    """
    measure = "behaviour" if all(scores(cell) is not None for cell in (base, *cells)) else "accuracy"
    forward = [cell for cell in cells if cell["strength"] > 0]
    gentle = [cell for cell in forward if not excesses(cell, base, limits)]
    counted = f"{len(gentle)} of {len(forward)} settings leave neutral text within the limits ({_limits(limits)})"
    if not gentle:
        return Choice(None, f"No setting: {counted}. Try smaller strengths.")
    best = max(gentle, key=lambda cell: (_mean(cell, measure), -cell["kl"]))
    top = f"{place(best)} has the best {_NAMES[measure]} on validation rows ({_mean(best, measure):.3f})"
    near = [
        cell
        for cell in gentle  # as good as the best, and better than nothing
        if _within_one_error(best, cell, measure) and (cell is best or not _within_one_error(cell, base, measure))
    ]
    if _within_one_error(best, base, measure):
        return Choice(
            None,
            f"No setting: {counted}, and of these {top}, which is within one standard error of the base model "
            f"({_mean(base, measure):.3f}). More validation rows, other layers or another direction could show more.",
        )
    chosen = min(near, key=lambda cell: (cell["kl"], abs(cell["strength"])))
    if len(near) == 1:
        return Choice(
            chosen,
            f"{counted}. Of these {top}, and no other is both within one standard error of it and ahead of the base "
            "model by more than that.",
        )
    here = "it has itself" if chosen is best else f"{place(chosen)} ({_mean(chosen, measure):.3f}) has"
    return Choice(
        chosen,
        f"{counted}. Of these {top}, and {len(near) - 1} more are within one standard error of it and ahead of the "
        f"base model by more than that; among them "
        f"{here} the least KL to the base model ({chosen['kl']:.3f} nats a token).",
    )


def excesses(cell: Cell, base: Cell, limits: Limits) -> list[str]:
    """Why a setting is too much for neutral text, in words; empty: it is not."""
    if not all(math.isfinite(cell[name]) for name in ("kl", "perplexity", "margin")):
        return ["its log-probabilities are not finite"]
    found = []
    if cell["kl"] > limits.kl:
        found.append(f"KL {cell['kl']:.2g}")
    if cell["perplexity"] > limits.perplexity * base["perplexity"]:
        found.append(f"perplexity × {cell['perplexity'] / base['perplexity']:.2g}")
    if cell.get("repetition", 0) > base.get("repetition", 0) + limits.repetition:
        found.append(f"repetition {cell['repetition']:.0%}")
    return found


def reliability(cell: Cell, cells: Sequence[Cell], base: Cell) -> Reliability:
    """Per-example slopes of the margin from the base model up to a setting.

    Args:
        cell: The setting.
        cells: All settings; those of the same place, on the same side of 0 and no stronger, are on its line.
        base: The base model.
    """
    on_line = [
        c
        for c in cells
        if (c["site"], c["layer"]) == (cell["site"], cell["layer"])
        and c["strength"] * cell["strength"] > 0
        and abs(c["strength"]) <= abs(cell["strength"])
    ]
    strengths = np.array([0.0, *(c["strength"] for c in on_line)])
    margins = np.array([base["margins"], *(c["margins"] for c in on_line)])
    slopes = np.polyfit(strengths, margins, 1)[0]
    wrong = int((slopes < 0).sum())
    interval = binomtest(wrong, len(slopes)).proportion_ci(method="wilson")
    return Reliability(
        [float(s) for s in slopes], wrong, wrong / len(slopes), float(interval.low), float(interval.high)
    )


def right(cell: Cell) -> NDArray[np.float64]:
    """1 for a pair whose chosen answer is likelier, ½ for a tie, 0 otherwise."""
    return (np.sign(np.array(cell["margins"], dtype=float)) + 1) / 2


def scores(cell: Cell) -> NDArray[np.float64] | None:
    """Scores of generated answers; None where they were not all scored."""
    found = cell.get("behaviours")
    return np.array(found, dtype=float) if found and None not in found else None


def place(cell: Cell) -> str:
    """A setting in words."""
    site = "" if cell["site"] == "block" else f" ({cell['site']})"
    return f"layer {cell['layer']}{site} at strength {cell['strength']:g}"


_NAMES = {"behaviour": "behaviour score", "accuracy": "pair accuracy"}


def _mean(cell: Cell, measure: str) -> float:
    return float(_values(cell, measure).mean())


def _values(cell: Cell, measure: str) -> NDArray[np.float64]:
    found = right(cell) if measure == "accuracy" else scores(cell)
    assert found is not None  # or the accuracy would have been taken
    return found


def _within_one_error(best: Cell, other: Cell, measure: str) -> bool:
    """Whether the best is ahead by no more than one standard error of the paired difference."""
    ahead = _values(best, measure) - _values(other, measure)
    # one example of n is exactly one standard error, but for rounding
    return bool(ahead.mean() <= (sem(ahead) if len(ahead) > 1 else 0.0) + _ROUNDING)


def _limits(limits: Limits) -> str:
    return (
        f"KL up to {limits.kl:g}, perplexity up to {limits.perplexity:g} times the base's, repetition up to "
        f"{limits.repetition:.0%} above the base's"
    )
