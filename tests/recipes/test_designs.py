"""Designs of a grid: which combinations of levels they run, and which effects these cannot tell apart."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from scipy.linalg import helmert

from steertune.recipes.ablation import designs

TWO = {"a": ["x", "y"], "b": ["p", "q"]}
THREE = {**TWO, "c": ["r", "s"]}


def levels_of(*sizes: int) -> dict[str, list[str]]:
    return {f"f{i}": [f"l{j}" for j in range(size)] for i, size in enumerate(sizes)}


def together(combinations: list[dict[str, str]]) -> list[str]:
    """Levels are single letters here."""
    return ["".join(levels.values()) for levels in combinations]


def test_full_is_the_product():
    found = designs.full({"a": ["x", "y"], "b": ["p", "q", "r"]})
    assert together(found) == ["xp", "xq", "xr", "yp", "yq", "yr"]
    assert found[1] == {"a": "x", "b": "q"}


EVEN = [((2, 2), 2), ((2, 2, 2), 2), ((2,) * 4, 2), ((2,) * 5, 2), ((3, 3), 3), ((3, 3, 3), 3), ((3,) * 4, 3)]
UNEVEN = [((2, 3), 2), ((3, 3, 3), 2), ((2, 3, 4), 2), ((2, 3, 4), 3)]


@pytest.mark.parametrize("sizes, reduction", [*EVEN, *UNEVEN])
def test_a_fraction_is_balanced_as_far_as_that_goes(sizes, reduction):
    factors, off = levels_of(*sizes), int((sizes, reduction) in UNEVEN)
    chosen, everything = designs.fractional(factors, reduction), designs.full(factors)
    assert abs(len(chosen) - len(everything) / reduction) <= off
    assert all(c in everything for c in chosen)
    assert len({tuple(c.items()) for c in chosen}) == len(chosen)
    for factor, levels in factors.items():
        counts = Counter(c[factor] for c in chosen)
        assert set(counts) == set(levels)
        assert max(counts.values()) - min(counts.values()) <= off


@pytest.mark.parametrize(
    "sizes, reduction, message",
    [
        *[((2, 2), n, f"design.reduction={n} reduces nothing.*2 or more") for n in (1, 0, -3)],
        *[(sizes, 9, "design.reduction=9.*smaller") for sizes in ((2, 2), (2, 2, 2))],  # leaves no design
        ((3,), 2, "two factors or more"),
    ],
)
def test_a_fraction_that_cannot_be_is_an_error(sizes, reduction, message):
    with pytest.raises(ValueError, match=message):
        designs.fractional(levels_of(*sizes), reduction)


def test_a_half_fraction_of_three_factors_aliases_every_main_effect_with_a_pair():
    assert sorted(designs.aliases(designs.fractional(THREE, 2), THREE)) == [
        "a cannot be told from b x c.",
        "b cannot be told from a x c.",
        "c cannot be told from a x b.",
    ]


@pytest.mark.parametrize("sizes", [(2, 2), (2, 3, 4), (2, 2, 2, 2)])
def test_a_full_factorial_and_a_half_fraction_of_four_factors_alias_nothing(sizes):
    factors = levels_of(*sizes)
    assert designs.aliases(designs.full(factors), factors) == []
    if len(sizes) == 4:
        assert designs.aliases(designs.fractional(factors, 2), factors) == []


def test_one_missing_run_mixes_a_little():
    # over the seven runs left, two of a, b, c, a x b, ... have covariance -8/49 or 8/49 and variance 48/49
    summed_up = ["All other couples of effects are mixed by r = 0.17 at most."]
    assert designs.aliases(designs.full(THREE)[:-1], THREE) == summed_up


def test_partial_aliases_equal_a_plain_canonical_correlation_and_come_in_its_order():
    factors = levels_of(2, 3, 4)
    chosen = designs.fractional(factors, 3)
    # any coding of sums that are zero gives the same interaction
    x, y, z = (
        np.array([helmert(len(levels))[:, levels.index(c[f])] for c in chosen]) for f, levels in factors.items()
    )

    def correlation(first: np.ndarray, second: np.ndarray) -> float:
        first, second = first - first.mean(axis=0), second - second.mean(axis=0)
        squares = np.linalg.pinv(first) @ second @ np.linalg.pinv(second) @ first
        return math.sqrt(max(0.0, *np.linalg.eigvals(squares).real))  # 0 may come out as less

    def product(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.einsum("ri,rj->rij", first, second).reshape(len(chosen), -1)

    named = {"f1 f2": correlation(y, z), "f0 f1 x f2": correlation(x, product(y, z))}
    named |= {"f1 f0 x f2": correlation(y, product(x, z)), "f2 f0 x f1": correlation(z, product(x, y))}
    *found, last = designs.aliases(chosen, factors)
    assert found == [
        f"{couple[:2]} is mixed (r = {named[couple]:.2f}) with {couple[3:]}."
        for couple in sorted(named, key=named.__getitem__, reverse=True)
    ]
    rest = max(correlation(x, y), correlation(x, z))
    assert last == f"All other couples of effects are mixed by r = {rest:.2f} at most."


def test_two_main_effects_that_always_move_together_are_named_and_they_alone():
    assert designs.aliases(designs.fractional(TWO, 2), TWO) == ["a cannot be told from b."]
    chosen = [c for c in designs.full(levels_of(2, 2, 2)) if c["f1"] == c["f2"]]
    assert designs.aliases(chosen, levels_of(2, 2, 2)) == ["f1 cannot be told from f2."]


def test_one_at_a_time_by_hand():
    factors, start = {"a": ["x", "y"], "b": ["p", "q", "r"]}, {"a": "y", "b": "q"}
    assert together(designs.one_at_a_time(factors, start)) == ["yq", "xq", "yp", "yr"]


def test_add_one_in_by_hand():
    start, end = {"a": "x", "b": "p", "c": "r"}, {"a": "y", "b": "q", "c": "s"}
    found = together(designs.add_one_in(THREE, start, end))
    assert found == ["xpr", "ypr", "xqr", "xps", "yqs", "xqs", "yps", "yqr"]


@pytest.mark.parametrize("end, expected", [("xpr", "xpr"), ("xqr", "xpr xqr"), ("yps", "xpr ypr xps yps")])
def test_add_one_in_repeats_nothing_and_moves_only_what_differs(end, expected):
    ends = [dict(zip(THREE, levels, strict=True)) for levels in ("xpr", end)]
    assert together(designs.add_one_in(THREE, *ends)) == expected.split()


def test_mixtures_by_hand():
    factors = {"a": ["x", "y", "z"], "b": ["p", "q"], "c": ["r", "s"]}
    found = designs.mixtures(factors, {"a": "z", "b": "q", "c": "r"}, {"a": "x", "b": "q", "c": "s"})
    assert together(found) == ["xqr", "xqs", "zqr", "zqs"]
