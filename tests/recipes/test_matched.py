"""The search for the strength at which a KL is reached, and the frontier of strengths."""

from __future__ import annotations

import math

import numpy as np
import pytest

from steertune.recipes.ablation.matched import Curve, Point, frontier, refined

# -- matched strength -------------------------------------------------------------------------------------------------

KL = 0.1


def search(kl, largest: float, target: float = KL) -> tuple[float | None, list[float]]:
    """The strength, and the strengths that were tried."""
    tried: list[float] = []

    def counted(strength: float) -> float:
        tried.append(strength)
        return kl(strength)

    found = Curve(counted, largest).crossing(target)
    assert len(tried) < 50
    assert min(tried) > 0 and max(tried) <= largest * (1 + 1e-12)
    return found, tried


@pytest.mark.parametrize("strength", [*np.geomspace(1e-3, 900, 30), 999.0])
def test_a_quadratic_kl_is_matched_over_six_orders_of_magnitude(strength):
    c = KL / strength**2
    found, tried = search(lambda s: c * s**2, 1000.0)
    assert found == pytest.approx(math.sqrt(KL / c), rel=0.02)
    assert len(tried) <= 10  # a parabola is followed in a leap


@pytest.mark.parametrize("target", [1e-6, 1e-3, 0.5, 20.0])
def test_any_target_is_matched(target):
    for c in (target / 50, target, target * 50):
        assert search(lambda s, c=c: c * s**2, 64.0, target)[0] == pytest.approx(math.sqrt(target / c), rel=0.02)


@pytest.mark.parametrize("largest", [1.0, 8.0, 64.0])
def test_a_target_beyond_the_largest_strength_is_not_found(largest):
    assert search(lambda s: KL * (s / (1.02 * largest)) ** 2, largest)[0] is None
    assert search(lambda s: KL * (s / (100 * largest)) ** 2, largest)[0] is None
    just_inside = search(lambda s: KL * (s / (0.99 * largest)) ** 2, largest)[0]
    assert just_inside == pytest.approx(0.99 * largest, rel=0.02)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("top", [0.101, 0.11, 0.5, 5.0])
def test_a_saturating_kl_is_matched(top, scale):
    found, _ = search(lambda s: top * (1 - math.exp(-((s / scale) ** 2))), 64.0)
    assert found == pytest.approx(scale * math.sqrt(-math.log(1 - KL / top)), rel=0.02)


@pytest.mark.parametrize("broken", [math.inf, math.nan])
@pytest.mark.parametrize("room", [1.05, 1.5, 10.0])
@pytest.mark.parametrize("strength", [0.02, 0.2, 0.9, 2.0, 30.0])
def test_a_kl_that_breaks_above_some_strength_is_matched_below(strength, room, broken):
    found, _ = search(lambda s: KL * (s / strength) ** 2 if s < room * strength else broken, 64.0)
    assert found == pytest.approx(strength, rel=0.02)


@pytest.mark.parametrize("value", [0.0, -1e-9, KL / 2, math.inf, math.nan])
def test_a_kl_that_never_comes_near_is_not_matched(value):
    assert search(lambda s: value * (1 - math.exp(-(s**2))), 64.0)[0] is None


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 3.0, 4.0, 8.0])
@pytest.mark.parametrize(
    "strength, largest",
    [*[(s, 64.0) for s in (1.1e-6, 0.003, 0.3, 1.0, 3.0, 63.0)], (0.05, 8.0), (0.1, 1.0), (0.45, 0.5), (2e-3, 3e-3)],
)
def test_other_powers_are_matched_whatever_the_largest(power, strength, largest):
    found, _ = search(lambda s: KL * (s / strength) ** power, largest)
    assert found == pytest.approx(strength, rel=0.02)


def test_no_strength_below_a_millionth_is_found():
    found, tried = search(lambda s: KL * (s / 5e-7) ** 2, 64.0)
    assert found is None and min(tried) >= 1e-6 * (1 - 1e-12)


@pytest.mark.parametrize("above", [math.inf, math.nan, 4.0, 2 * KL])
@pytest.mark.parametrize("jump", [1e-3, 0.5, 0.7, 20.0])
def test_a_kl_that_jumps_over_the_target_is_not_matched(above, jump):
    assert search(lambda s: KL / 2 * (s / jump) ** 2 if s < jump else above, 64.0)[0] is None


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("off", [0.8, 1.0, 1.25])
def test_a_refined_strength_takes_three_evaluations_at_most(power, off):
    evaluated = []

    def kl(strength: float) -> float:
        evaluated.append(strength)
        return 0.4 * strength**power

    point = refined(kl, 0.3, off * 0.75 ** (1 / power), largest=64.0)
    assert point.reached and point.kl == kl(point.strength) == pytest.approx(0.3, rel=0.03)
    assert len(evaluated) <= 4  # with the one of this test


@pytest.mark.parametrize("value", [0.1, 0.9, float("nan")])
def test_a_kl_that_never_is_the_target_is_not_refined(value):
    assert not refined(lambda s: value, 0.3, 1.0, largest=64.0).reached
    assert not refined(lambda s: 0.1 if s < 1 else 0.9, 0.3, 1.0, largest=64.0).reached


# -- frontiers --------------------------------------------------------------------------------------------------------

TARGETS = [0.03, 0.1, 0.3]


def frontier_of(kl, largest: float = 64.0, few_rows: float = 1.0):
    """The frontier of a KL, of which few rows show `few_rows` times as much; and how often all rows were evaluated."""
    evaluated: dict[float, float] = {}

    def every(strength: float) -> float:
        evaluated[strength] = kl(strength)
        return evaluated[strength]

    points, falls = frontier(lambda s: few_rows * kl(s), every, TARGETS, largest)
    assert [point.target for point in points] == TARGETS
    return points, falls, len(evaluated)


@pytest.mark.parametrize("few_rows", [0.7, 1.0, 1.4])
@pytest.mark.parametrize(
    "kl", [lambda s: 0.1 * s**2, lambda s: 0.6 * (1 - math.exp(-((s / 3) ** 2))), lambda s: 0.02 * s, lambda s: s**3]
)
def test_a_frontier_takes_at_most_three_evaluations_of_all_rows_per_target(kl, few_rows):
    points, falls, evaluations = frontier_of(kl, few_rows=few_rows)
    assert all(point.reached and point.kl == pytest.approx(point.target, rel=0.1) for point in points)
    assert evaluations <= 3 * len(TARGETS) and not falls


@pytest.mark.parametrize("top", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("at", [0.3, 1.0, 8.0])
def test_a_kl_with_a_bump_is_reached_below_the_bump_and_recorded(top, at):
    # up to `top` at the strength `at`, and down again beyond it
    points, falls, _ = frontier_of(lambda s: top * (s / at) ** 2 * math.exp(1 - (s / at) ** 2))
    for point in points:
        assert point.reached == (point.target <= top)
        assert point.strength <= 1.5 * at  # a short arm keeps its last point, near the top of the bump
        if not point.reached:
            assert 0.5 * top <= point.kl <= top
    assert falls or top == 0.6  # which the search never had to cross


def test_a_strength_that_was_measured_before_is_not_measured_again():
    evaluated: list[float] = []

    def every(strength: float) -> float:
        evaluated.append(strength)
        return 0.1 * strength**2

    before = {1.01: 0.1 * 1.01**2, 5.0: 0.3}  # the second one lies at another crossing
    points, _ = frontier(lambda s: 0.1 * s**2, every, TARGETS, 64.0, before)
    assert points[1] == Point(0.1, 1.01, before[1.01], True)
    assert points[2].strength == pytest.approx(3**0.5, rel=0.05)
    assert all(abs(strength - 1) > 0.1 for strength in evaluated)


def test_an_arm_that_stops_short_keeps_its_last_point():
    points, falls, _ = frontier_of(lambda s: 0.05 * s**2, largest=1.0)
    assert [point.reached for point in points] == [True, False, False] and not falls
    assert all(point.strength == pytest.approx(1.0) and point.kl == pytest.approx(0.05) for point in points[1:])


def test_a_kl_that_jumps_over_a_target_keeps_the_point_below():
    points, _, _ = frontier_of(lambda s: 0.05 * s**2 if s < 1 else 5.0)
    assert [point.reached for point in points] == [True, False, False]
    assert all(0.01 < point.kl < 0.05 for point in points[1:])
