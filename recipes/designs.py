"""Which combinations of factor levels a grid runs, and what a fraction of them cannot tell apart.

A combination maps factor -> level. Levels keep the order of the grid's file.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pyDOE3 import gsd

Combination = dict[str, str]
Factors = Mapping[str, Sequence[str]]


def full(factors: Factors) -> list[Combination]:
    """Full factorial: every combination."""
    return [dict(zip(factors, levels, strict=True)) for levels in itertools.product(*factors.values())]


def fractional(factors: Factors, reduction: int) -> list[Combination]:
    """About one in `reduction` of the full factorial, every level of a factor equally often as far as that goes: a
    generalised subset design (Surowiec et al., Anal. Chem. 89, 2017), by pyDOE3.

    Raises:
        ValueError: the reduction leaves no design.
    """
    if reduction < 2:
        raise ValueError(f"design.reduction={reduction} reduces nothing: it must be 2 or more.")
    if len(factors) < 2:
        raise ValueError(f"A fraction needs two factors or more, there are {[*factors]}: choose design.kind='full'.")
    try:
        rows = gsd([len(levels) for levels in factors.values()], reduction)
    except ValueError as error:
        raise ValueError(f"design.reduction={reduction}: {error}. Choose a smaller one.") from error
    return [{f: factors[f][int(i)] for f, i in zip(factors, row, strict=True)} for row in np.asarray(rows)]


def one_at_a_time(factors: Factors, start: Combination) -> list[Combination]:
    """The start, and every other level of every factor alone."""
    return [start] + [
        {**start, factor: level} for factor, levels in factors.items() for level in levels if level != start[factor]
    ]


def add_one_in(factors: Factors, start: Combination, end: Combination) -> list[Combination]:
    """The start, the start with each factor moved to its end, the end, and the end with each factor moved back:
    first and last place of every factor on the way."""
    moving = [factor for factor in factors if start[factor] != end[factor]]
    found = [start, *({**start, f: end[f]} for f in moving), end, *({**end, f: start[f]} for f in moving)]
    return [c for i, c in enumerate(found) if c not in found[:i]]


def aliases(combinations: Sequence[Combination], factors: Factors) -> list[str]:
    """Main effects that the design cannot tell from each other, or from an interaction of two others, as sentences.

    For every such couple the largest canonical correlation, over the runs, between the two: 1 means they are the same
    thing in this design.
    """
    columns = {f: _contrasts([c[f] for c in combinations], levels) for f, levels in factors.items()}
    found = []
    for first, second in itertools.combinations(factors, 2):
        found += _mixed(first, second, _canonical_correlation(columns[first], columns[second]))
    for factor in factors:
        for first, second in itertools.combinations([f for f in factors if f != factor], 2):
            products = [a * b for a in columns[first].T for b in columns[second].T]
            found += _mixed(
                factor,
                f"{first} x {second}",
                _canonical_correlation(columns[factor], np.column_stack(products)),
            )
    return found


def _mixed(first: str, second: str, r: float) -> list[str]:
    if r <= 0.1:
        return []
    return [f"{first} cannot be told from {second}." if r > 0.99 else f"{first} is mixed (r = {r:.2f}) with {second}."]


def _contrasts(values: Sequence[str], levels: Sequence[str]) -> NDArray[np.float64]:
    """Sum-to-zero coding, `(runs, levels - 1)`."""
    last = np.array([value == levels[-1] for value in values], dtype=float)
    return np.column_stack([np.array([v == level for v in values], dtype=float) - last for level in levels[:-1]])


def _canonical_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    bases = []
    for matrix in (first, second):
        centred = matrix - matrix.mean(axis=0)
        u, s, _ = np.linalg.svd(centred, full_matrices=False)
        bases.append(u[:, s > 1e-9 * max(1.0, float(s.max(initial=0.0)))])
    if 0 in (bases[0].shape[1], bases[1].shape[1]):
        return 0.0
    return float(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)[0])
