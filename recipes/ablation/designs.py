"""Which combinations of factor levels a grid runs, and which effects a fraction of them confounds.

A combination maps factor -> level. Levels keep the order of the grid's file.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pyDOE3 import gsd

_NAMED = 0.3

Combination = dict[str, str]
Factors = Mapping[str, Sequence[str]]


def full(factors: Factors) -> list[Combination]:
    """Full factorial: every combination."""
    return [dict(zip(factors, levels, strict=True)) for levels in itertools.product(*factors.values())]


def fractional(factors: Factors, reduction: int) -> list[Combination]:
    """About one in `reduction` combinations of the full factorial, with the levels of every factor as balanced as
    possible: a generalised subset design (Surowiec et al., Anal. Chem. 89, 2017), by pyDOE3.

    Raises:
        ValueError: the reduction leaves no design.
    """
    if reduction < 2:
        raise ValueError(f"design.reduction={reduction} reduces nothing: it must be 2 or more.")
    if len(factors) < 2:
        raise ValueError(f"A fraction needs two factors or more (got {[*factors]}). Choose design.kind = 'full'.")
    try:
        rows = gsd([len(levels) for levels in factors.values()], reduction)
    except ValueError as error:
        raise ValueError(f"design.reduction={reduction}: {error}. Choose a smaller one.") from error
    return [{f: factors[f][int(i)] for f, i in zip(factors, row, strict=True)} for row in np.asarray(rows)]


def one_at_a_time(factors: Factors, start: Combination) -> list[Combination]:
    """The start, and the start with one factor changed, for every other level of every factor."""
    return [start] + [
        {**start, factor: level} for factor, levels in factors.items() for level in levels if level != start[factor]
    ]


def add_one_in(factors: Factors, start: Combination, end: Combination) -> list[Combination]:
    """The start, the start with each factor moved to its end, the end, and the end with each factor moved back, so
    that every factor is changed both first and last on the way."""
    moving = [factor for factor in factors if start[factor] != end[factor]]
    steps = [start, *({**start, f: end[f]} for f in moving), end, *({**end, f: start[f]} for f in moving)]
    return [c for i, c in enumerate(steps) if c not in steps[:i]]


def mixtures(factors: Factors, start: Combination, end: Combination) -> list[Combination]:
    """Every mixture of two combinations, which exact Shapley shares of the gap between them need."""
    return full({f: [level for level in factors[f] if level in (start[f], end[f])] for f in factors})


def aliases(combinations: Sequence[Combination], factors: Factors) -> list[str]:
    """Main effects that the design mixes with each other, or with an interaction of two others, as sentences.

    Every pair of effects is described by their largest canonical correlation r over the runs: 1 means that this design
    cannot separate them. Pairs above 0.3 are listed, the rest is summarised.
    """
    columns = {}
    for factor, levels in factors.items():  # sum-to-zero coding, (runs, levels - 1)
        codes = np.array([[c[factor] == level for level in levels] for c in combinations], dtype=float)
        columns[factor] = codes[:, :-1] - codes[:, -1:]
    couples = {pair: columns[pair[1]] for pair in itertools.combinations(factors, 2)}
    for first, second in itertools.combinations(factors, 2):
        product = np.column_stack([a * b for a in columns[first].T for b in columns[second].T])
        couples |= {(f, f"{first} x {second}"): product for f in factors if f not in (first, second)}
    correlations = {pair: _canonical_correlation(columns[pair[0]], other) for pair, other in couples.items()}
    named = sorted((pair for pair, r in correlations.items() if r > _NAMED), key=lambda pair: -correlations[pair])
    sentences = []
    for first, other in named:
        r = correlations[first, other]
        kind = "cannot be told from" if r > 0.99 else f"is mixed (r = {r:.2f}) with"
        sentences.append(f"{first} {kind} {other}.")
    rest = max((r for pair, r in correlations.items() if pair not in named), default=0.0)
    return sentences + ([f"All other couples of effects are mixed by r = {rest:.2f} at most."] if rest > 0.01 else [])


def _canonical_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    bases = []
    for matrix in (first, second):
        centred = matrix - matrix.mean(axis=0)
        u, s, _ = np.linalg.svd(centred, full_matrices=False)
        bases.append(u[:, s > 1e-9 * max(1.0, float(s.max(initial=0.0)))])
    if 0 in (bases[0].shape[1], bases[1].shape[1]):
        return 0.0
    return float(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)[0])
