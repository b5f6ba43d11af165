"""Measures: the numbers on a page. Each file of this folder is one measure, named by the file:

    @measure("held-out pair accuracy", better="higher", needs=["pairs"])
    def accuracy(seen: Seen) -> Array:
        \"\"\"Share of the pairs whose chosen answer is likelier than the rejected one; a tie counts half.\"\"\"
        return (np.sign(seen["margin"]) + 1) / 2

A measure is a function from the observations of a model (`lab/observe.py`) to one value for every example. It can use
other measures by name. A new file adds the measure to every recipe, and to every record that has the observations it
needs.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from steertune.adapters.registry import file_names
from steertune.recipes.lab.files import ArmError, nearest

Array = NDArray[Any]
_NEAR = 1e-5  # for the slope of a total


class Missing(LookupError):
    """A record lacks the observation that a measure needs."""


class Seen:
    """The observations of a model at one strength, and the measures that are computed from them.

    Args:
        observations: Name -> one value for every example: numbers, texts, or None.
        base: The observations of the base model on the same examples; None: this is the base model.
    """

    def __init__(self, observations: Mapping[str, Sequence[Any]], base: Seen | None = None) -> None:
        self.observations = observations
        self._base = base
        self._arrays: dict[str, Array] = {}

    @property
    def base(self) -> Seen:
        """The observations of the base model on the same examples."""
        return self if self._base is None else self._base

    def __getitem__(self, name: str) -> Array:
        """An observation, or else the measure of this name, `(examples,)`.

        Raises:
            Missing: neither was recorded.
        """
        if name in self.observations:
            return self.recorded(name)
        if name not in names():
            raise Missing(f"No observation {name!r} was recorded; there are {sorted(self.observations)}.")
        return get(name).values(self)

    def recorded(self, name: str) -> Array:
        """An observation as an array, `(examples,)`; a missing value is NaN."""
        if name not in self._arrays:
            values = self.observations[name]
            kind = object if any(isinstance(value, str) for value in values) else float
            self._arrays[name] = np.array(values, dtype=kind)
        return self._arrays[name]

    def __contains__(self, name: str) -> bool:
        try:
            return len(self[name]) > 0
        except Missing:
            return False


@dataclass(frozen=True)
class Measure:
    """One measure.

    Attributes:
        name: The name of its file.
        title: Its title on a page.
        unit: Unit of its values; "" without a unit.
        better: Which direction is better, if any.
        needs: Observers of `lab/observe.py` whose observations it uses.
        rows: Computes one value for every example from the observations.
        weight: Observation that weights the examples in the mean, such as a number of tokens; "": equal weights.
        total: Applied to the mean, such as `exp` for a perplexity.
        observe: For a measure without an observer: `(model, held_out)` -> one value for every example, computed with
            the model at the current strength and recorded under the measure's name.
        limits: Range of every value, such as (0, 1) for a share; the mean and its interval are in it too.
        shares: Whether values are shares or probabilities if all of them lie between 0 and 1; then the mean and its
            interval do, too.
        trust: Its rank in the order in which to read measures, 1 first, from tests on problems with a known answer
            (`docs/pages/measures.md`); None: it was not tested on them, or failed.
    """

    name: str
    title: str
    unit: str
    better: Literal["higher", "lower"] | None
    needs: tuple[str, ...]
    rows: Callable[[Seen], Array]
    weight: str = ""
    total: Callable[[float], float] | None = None
    observe: Callable[[Any, Any], Sequence[float]] | None = None
    limits: tuple[float, float] = (-math.inf, math.inf)
    trust: int | None = None
    shares: bool = False

    @property
    def heading(self) -> str:
        """Its title with its unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def values(self, seen: Seen) -> Array:
        """One value for every example: the values recorded under the measure's name, or else those computed from
        other observations.

        Raises:
            Missing: an observation was not recorded.
        """
        return seen.recorded(self.name) if self.name in seen.observations else self.rows(seen)

    def summary(self, seen: Seen) -> float:
        """The mean over the examples that have a value; NaN if none has.

        Raises:
            Missing: an observation was not recorded.
        """
        parts = self.parts(seen)
        return math.nan if np.isnan(parts).all() else float(np.nanmean(parts))

    def parts(self, seen: Seen) -> Array:
        """The contribution of every example to the summary, `(examples,)`: their mean is the summary, and their spread
        is that of the summary, so that differences between arms can be computed example by example.

        Without weights and `total` these are the values. A weighted mean m is a ratio, to which example i contributes
        `m + (w_i / mean(w)) (value_i - m)`; to a total t it contributes `t(m) + t'(m) (part_i - m)` (the delta method,
        Särndal et al. 1992, 5.6).

        Raises:
            Missing: an observation was not recorded.
        """
        values = self.values(seen)
        valid = ~np.isnan(values)
        # a mean that was recorded instead of values per example has no weights
        weighted = self.weight in seen.observations and self.name not in seen.observations
        if not valid.any() or not (weighted or self.total):
            return values
        weights = np.where(valid, seen[self.weight], np.nan) if weighted else np.ones_like(values)
        mean = float(np.average(values[valid], weights=weights[valid]))
        parts = mean + weights / np.nanmean(weights) * (values - mean)
        if self.total is None:
            return parts
        slope = (self.total(mean + _NEAR) - self.total(mean - _NEAR)) / (2 * _NEAR)
        return self.total(mean) + slope * (parts - mean)


def measure(
    title: str,
    *,
    needs: Sequence[str] = (),
    unit: str = "",
    better: Literal["higher", "lower"] | None = None,
    weight: str = "",
    total: Callable[[float], float] | None = None,
    observe: Callable[[Any, Any], Sequence[float]] | None = None,
    limits: tuple[float, float] = (-math.inf, math.inf),
    trust: int | None = None,
    shares: bool = False,
) -> Callable[[Callable[[Seen], Array]], Measure]:
    """Turn a function into a measure; see `Measure` for the arguments."""

    def decorate(function: Callable[[Seen], Array]) -> Measure:
        return Measure(
            function.__name__,
            title,
            unit,
            better,
            tuple(needs),
            function,
            weight,
            total,
            observe,
            limits,
            trust,
            shares,
        )

    return decorate


@cache
def names() -> tuple[str, ...]:
    """The measures: the files of this folder."""
    return tuple(file_names(*__path__))


def ranked() -> list[str]:
    """The measures in the order in which to read them: the trusted ones first, then the others by name."""
    trust = {name: get(name).trust for name in names()}
    return sorted(names(), key=lambda name: (trust[name] is None, trust[name] or 0, name))


def served_by(*observers: str) -> list[str]:
    """The measures that need no other observers than these."""
    return [name for name in names() if get(name).observe is None and {*get(name).needs} <= {*observers}]


@cache
def get(name: str) -> Measure:
    """A measure by name.

    Raises:
        ArmError: an unknown measure; the message names the nearest.
    """
    if name not in names():
        raise ArmError(f"Unknown measure {name!r}. Available: {list(names())}.{nearest(name, names())}")
    return getattr(importlib.import_module(f"{__name__}.{name}"), name)
