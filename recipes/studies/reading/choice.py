"""What the three jobs say together: does reading predict control, what does a choice cost, is the direction used?

A unit is a task with a seed. Within it the settings are directions at layers; random directions are left out of
correlations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from scipy.stats import spearmanr

from steertune.recipes.lab.intervals import Interval, interval
from steertune.recipes.studies.reading.directions import RANDOM
from steertune.recipes.studies.reading.predictors import PREDICTORS

Record: TypeAlias = Mapping[str, Any]
"""One direction at one layer, read and written in one way."""
FOR, REGRET = 0.3, 0.1
"""The rank correlation that is claimed, and the regret that counts against it."""


def units(records: Sequence[Record]) -> list[list[Record]]:
    """The settings of every task and seed, without random directions."""
    by: dict[tuple[Any, ...], list[Record]] = {}
    for one in records:
        if not one["direction"].startswith(RANDOM):
            by.setdefault((one["task"], one["seed"]), []).append(one)
    return [*by.values()]


def correlation(unit: Sequence[Record], predictor: str) -> float | None:
    """Spearman's rank correlation of a predictor with control; None if one of them is the same everywhere."""
    values, control = (np.array([one[name] for one in unit]) for name in (predictor, "control"))
    if len(unit) < 3 or np.ptp(values) == 0 or np.ptp(control) == 0:
        return None
    result: Any = spearmanr(values, control)
    return float(result.statistic)


def regret(unit: Sequence[Record], predictor: str) -> float | None:
    """What choosing by a predictor loses, as a share of the best control; None if nothing controls.

    Settings that a predictor ranks equally are a draw, and count with their mean.
    """
    best = max(one["control"] for one in unit)
    if best <= 0:
        return None
    top = max(one[predictor] for one in unit)
    chosen = [one["control"] for one in unit if one[predictor] == top]
    return float(best - np.mean(chosen)) / best


@dataclass(frozen=True)
class Predictor:
    """How well a cheap number predicts control, over units.

    Attributes:
        name: Name of the number.
        rho: Rank correlation with control.
        regret: Share of the best control that is lost by choosing with it.
    """

    name: str
    rho: Interval
    regret: Interval


def predictors(records: Sequence[Record]) -> list[Predictor]:
    """All predictors, the smallest regret first."""
    results = []
    for name in PREDICTORS:
        rhos, regrets = ([f(unit, name) for unit in units(records)] for f in (correlation, regret))
        results.append(Predictor(name, _over(rhos), _over(regrets)))
    return sorted(results, key=lambda one: np.nan_to_num(one.regret.estimate, nan=np.inf))


def _over(values: Sequence[float | None]) -> Interval:
    measured = [value for value in values if value is not None]
    return interval(measured) if measured else Interval(float("nan"), -np.inf, np.inf, 0, "none")


def verdict(records: Sequence[Record]) -> tuple[Literal["for", "against", "undecided"], str]:
    """Whether reading predicts control, as the claim says."""
    [reading] = [one for one in predictors(records) if one.name == "auroc"]
    sentence = (
        f"Over {reading.rho.pairs} tasks and seeds, the rank correlation of AUROC with control is {reading.rho}, and "
        f"choosing by AUROC loses {reading.regret} of the best control. Claimed: a correlation above {FOR:g}."
    )
    if reading.rho.low > FOR and not reading.regret.low > REGRET:
        return "for", sentence
    within = reading.rho.low >= -FOR and reading.rho.high <= FOR
    return ("against" if within or reading.regret.low > REGRET else "undecided"), sentence


def silences(records: Sequence[Record]) -> dict[str, tuple[Interval, float]]:
    """Direction -> its silence minus the mean silence of random directions, each at its best layer, over units; and
    the share of units in which it exceeds all of them."""
    best: dict[tuple[Any, ...], dict[str, float]] = {}
    for one in records:
        if one["silence"] is not None:
            of_unit = best.setdefault((one["task"], one["seed"]), {})
            of_unit[one["direction"]] = max(one["silence"], of_unit.get(one["direction"], -np.inf))
    gaps: dict[str, list[float]] = {}
    wins: dict[str, list[bool]] = {}
    for of_unit in best.values():
        random = [value for name, value in of_unit.items() if name.startswith(RANDOM)]
        for name, value in of_unit.items():
            if random and not name.startswith(RANDOM):
                gaps.setdefault(name, []).append(value - float(np.mean(random)))
                wins.setdefault(name, []).append(value > max(random))
    return {name: (interval(values), float(np.mean(wins[name]))) for name, values in gaps.items()}
