"""The strengths at which an arm is used, and whether they are close to the strength at which it was trained.

A trained arm that has to be scaled far to reach a KL is not what was trained: it is *extrapolated*, and wins no claim.
Closed forms have no strength of their own and are exempt. An arm that does not reach a KL stops *short*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.lab.limits import Limits
from steertune.recipes.lab.rows import TUNED

TRAINED = 0.5, 2.0
"""The strengths at which an arm still counts as what was trained."""
IS_EXTRAPOLATED = f"is extrapolated (trained, and used at strengths outside {TRAINED[0]:g} to {TRAINED[1]:g})"
SHORT, EXTRAPOLATED = "†", "‡"
_SOME = 0.1  # share of the cells
Test = Callable[[Mapping[str, Any]], bool]
"""A test of one point of a frontier, as a cell stores it."""


def extrapolated(cells: Frame, targets: Sequence[float]) -> bool:
    """Whether more than one in ten trained cells lie outside the strengths of `TRAINED` at one of these KLs."""
    if "frontier" not in cells or "setting_steps" not in cells:
        return False
    trained = cells[cells["setting_steps"] > 0]
    low, high = TRAINED
    return _often(trained, targets, lambda point: not low <= point["strength"] <= high)


def short(cells: Frame, targets: Sequence[float]) -> bool:
    """Whether a cell does not reach one of these KLs."""
    return "frontier" in cells and _often(cells, targets, lambda point: not point["reached"], some=0.0)


def unfit(cells: Frame, arm: str, strength: str, targets: Sequence[float]) -> str:
    """Why an arm wins no claim at a strength, in words; "" if it can win one. `targets` are the KLs that belong to the
    strength."""
    of_arm = cells[cells["arm"] == arm]
    if "frontier" not in of_arm:  # from an older version, which did not have these rules
        return ""
    if extrapolated(of_arm, targets) or (strength == TUNED and _tuned_outside(of_arm)):
        return f"{arm} {IS_EXTRAPOLATED}"
    limits, harms = Limits(), []
    perplexity = of_arm[f"perplexity_ratio@{strength}"].mean()
    if perplexity > limits.perplexity:
        harms.append(f"perplexity x {perplexity:.2f}")
    for name in ("repetition", "neutral_repetition"):
        value, base = of_arm[f"{name}@{strength}"].mean(), of_arm[f"{name}@0"].mean()
        if value > base + limits.repetition:
            harms.append(f"{name.replace('_', ' ')} {value:.0%}")
    return f"{arm} is beyond what a sweep allows ({', '.join(harms)})" if harms else ""


def _tuned_outside(cells: Frame) -> bool:
    """Whether the tuning chose strengths outside `TRAINED` in more than one in ten trained cells."""
    if not {"setting_steps", "tuned_strength", "scalable"} <= {*cells}:
        return False
    strengths = cells.loc[(cells["setting_steps"] > 0) & (cells["scalable"] == True), "tuned_strength"]  # noqa: E712
    low, high = TRAINED
    return bool(((strengths < low) | (strengths > high)).sum() > _SOME * len(strengths))


def marks(cells: Frame, targets: Sequence[float]) -> str:
    """The marks of an arm at these KLs: "", `SHORT`, `EXTRAPOLATED`, or both."""
    return f"{SHORT if short(cells, targets) else ''}{EXTRAPOLATED if extrapolated(cells, targets) else ''}"


def _often(cells: Frame, targets: Sequence[float], test: Test, some: float = _SOME) -> bool:
    """Whether the test holds at one of the KLs in more than a share of the cells that have points."""
    points = [
        [point for point in cell if point["target"] in targets] for cell in cells["frontier"] if isinstance(cell, list)
    ]
    hits = sum(any(map(test, cell)) for cell in points)
    return hits > some * len(points)
