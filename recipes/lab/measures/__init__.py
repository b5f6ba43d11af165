"""Measures: the numbers on a page. Each file of this folder is one measure, named by the file:

    @measure("held-out pair accuracy", better="higher", needs=["pairs"])
    def accuracy(seen: Seen) -> Array:
        \"\"\"Share of the pairs whose chosen answer is likelier than the rejected one; a tie counts half.\"\"\"
        return (np.sign(seen["margin"]) + 1) / 2

A measure is a function from the observations of a model (`lab/observe.py`) to one value for every example. It may use
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
    """A record does not hold the observation that a measure needs."""


class Seen:
    """The observations of a model at one strength, and the measures that follow from them.

    Args:
        observations: Name -> one value for every example: numbers, texts, or None.
        base: The base model's on the same examples; None: this is the base model.
    """

    def __init__(self, observations: Mapping[str, Sequence[Any]], base: Seen | None = None) -> None:
        self.observations = observations
        self._base = base
        self._arrays: dict[str, Array] = {}

    @property
    def base(self) -> Seen:
        """The base model on the same examples."""
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
        name: Its file.
        title: Its title on a page.
        unit: Of its values; "" without a unit.
        better: Which direction is better, if one is.
        needs: Observers of `lab/observe.py` whose observations it uses.
        rows: What was seen -> one value for every example.
        weight: Observation that weights the examples in the mean, such as a number of tokens; "": all count the same.
        total: Applied to the mean, such as `exp` for a perplexity.
        observe: For a measure that no observer serves: `(model, held_out)` -> one value for every example, computed
            with the model at the strength in question and recorded under the measure's own name.
        limits: Range of every value, such as (0, 1) for a share; the mean and its interval lie in it too.
        trust: Its place in the order in which to read measures, 1 first, as found on problems with a known answer
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

    @property
    def heading(self) -> str:
        """Its title with its unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def values(self, seen: Seen) -> Array:
        """One value for every example: recorded under the measure's name, or else computed from the other
        observations.

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
        """The part of every example in the summary, `(examples,)`: their mean is the summary, and they vary as it
        does, so that the difference of two arms is that of their summaries.

        Without weights and `total` these are the values. A weighted mean m is a ratio, of which example i is
        `m + (w_i / mean(w)) (value_i - m)`; of a total t it is `t(m) + t'(m) (part_i - m)` (the delta method, Särndal
        et al. 1992, 5.6).

        Raises:
            Missing: an observation was not recorded.
        """
        values = self.values(seen)
        valid = ~np.isnan(values)
        # a mean that was recorded in place of its examples has no weights
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
) -> Callable[[Callable[[Seen], Array]], Measure]:
    """Turn a function into a measure; see `Measure` for the arguments."""

    def decorate(function: Callable[[Seen], Array]) -> Measure:
        own = tuple(needs), function, weight, total, observe, limits, trust
        return Measure(function.__name__, title, unit, better, *own)

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
    """The measures that need these observers and nothing else."""
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
