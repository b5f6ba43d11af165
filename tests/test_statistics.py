"""The statistics of a grid, its designs and the matched strength: values by hand, slow plain references, other
libraries, and small simulations."""

from __future__ import annotations

import gc
import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from scipy import stats
from statsmodels.stats.anova import anova_lm

from steertune.recipes import designs
from steertune.recipes.matched import matched_strength
from steertune.recipes.statistics import curves, factorial, paired
from steertune.recipes.statistics.shapley import shapley, shares


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Holm's correction in statsmodels collects garbage on every call: spare it what torch and others keep alive."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# -- paired: intervals ----------------------------------------------------------------------------------------------


def normal(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size)


@pytest.mark.parametrize("pairs", [paired.FEW, 25])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_many_pairs_get_the_bca_interval_of_scipy(pairs, confidence):
    values = np.exp(normal(pairs))  # skewed, where BCa differs from the percentiles
    found = paired.interval(values, confidence=confidence, seed=3)
    theirs = stats.bootstrap(
        (values,), np.mean, confidence_level=confidence, n_resamples=9999, method="BCa", rng=3
    ).confidence_interval
    assert (found.low, found.high) == (theirs.low, theirs.high)
    assert (found.method, found.pairs, found.estimate) == ("bca", pairs, pytest.approx(values.mean()))


@pytest.mark.parametrize("pairs", [2, 5, paired.FEW - 1])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_few_pairs_get_students_t(pairs, confidence):
    values = normal(pairs, seed=pairs) + 0.3
    found = paired.interval(values, confidence=confidence)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert (found.method, found.pairs) == ("t", pairs)


def test_t_interval_by_hand():
    found = paired.interval([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)  # t quantile with 2 degrees of freedom; the standard deviation is 1
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), abs=1e-5)
    assert not found.excludes_zero
    assert str(found) == "+2.000 [-0.484, +4.484]"


def test_method_can_be_chosen_whatever_the_number_of_pairs():
    few, many = normal(5), normal(20)
    assert paired.interval(few, method="bca").method == "bca"
    assert paired.interval(few, method="bca") != paired.interval(few)
    theirs = stats.ttest_1samp(many, 0).confidence_interval()
    found = paired.interval(many, method="t")
    assert (found.low, found.high, found.method) == (pytest.approx(theirs.low), pytest.approx(theirs.high), "t")


def test_the_seed_decides_the_bootstrap():
    values = normal(15)
    assert paired.interval(values, seed=1) == paired.interval(values, seed=1)
    assert paired.interval(values, seed=1) != paired.interval(values, seed=2)


def test_one_pair_says_nothing():
    found = paired.interval([0.4])
    assert (found.estimate, found.low, found.high) == (0.4, -math.inf, math.inf)
    assert (found.pairs, found.method) == (1, "none")
    assert not found.excludes_zero


@pytest.mark.parametrize("pairs, method", [(3, "t"), (12, "bca")])
@pytest.mark.parametrize("value", [0.0, 0.25, -1.5])
def test_constant_differences_have_no_width(pairs, method, value):
    found = paired.interval([value] * pairs)
    assert (found.estimate, found.low, found.high, found.method) == (value, value, value, method)
    assert found.excludes_zero == (value != 0)


def test_differences_that_are_equal_up_to_rounding_have_almost_no_width():
    # 0.8 - 0.6 is not 0.7 - 0.5 in floating point: the bootstrap has spread, but none that means anything
    found = paired.interval([a / 10 - (a - 2) / 10 for a in (8, 7, 9, 6, 5, 4, 3, 8, 7, 6, 9, 10)])
    assert found.low == pytest.approx(0.2) and found.high == pytest.approx(0.2)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf, 1.0, 2.0], [math.nan] * 12, [-math.inf]])
def test_no_interval_of_what_is_not_finite(bad):
    with pytest.raises(ValueError, match=f"{len(bad)} differences, .* not finite"):
        paired.interval(bad)


def test_excludes_zero_on_either_side_only():
    assert paired.Interval(1, 0.5, 2, 3, "t").excludes_zero
    assert paired.Interval(-1, -2, -0.5, 3, "t").excludes_zero
    assert not paired.Interval(0, -1, 1, 3, "t").excludes_zero
    assert not paired.Interval(1, 0, 2, 3, "t").excludes_zero


def test_t_covers_what_it_promises_with_few_pairs_and_bca_does_not(monkeypatch):
    """Why there is a FEW at all."""
    monkeypatch.setattr(paired, "RESAMPLES", 499)
    samples = normal(500, 5) + 0.7

    def coverage(method: str, repetitions: int) -> float:
        found = [paired.interval(values, method=method) for values in samples[:repetitions]]
        return float(np.mean([i.low <= 0.7 <= i.high for i in found]))

    assert 0.92 < coverage("t", 500) < 0.98
    assert coverage("bca", 150) < 0.92


# -- paired: pairs and test rows at once ------------------------------------------------------------------------------


def test_crossed_interval_is_wider_where_test_rows_carry_a_shared_effect():
    effects = normal(1, 40) + 0.3 * normal(12, 40, seed=1)
    crossed, seeds_only = paired.crossed_interval(effects), paired.interval(effects.mean(axis=1))
    assert crossed.estimate == pytest.approx(seeds_only.estimate)
    assert crossed.high - crossed.low > 3 * (seeds_only.high - seeds_only.low)
    # the mean of 40 rows with unit spread, plus what the pairs add
    assert crossed.high - crossed.low == pytest.approx(2 * 1.96 / math.sqrt(40), rel=0.25)
    assert (crossed.pairs, crossed.method) == (12, "crossed")


def test_crossed_interval_covers_the_truth_where_a_seeds_only_interval_does_not():
    crossed = seeds_only = 0
    for seed in range(80):
        rng = np.random.default_rng(seed)
        effects = 0.5 + 0.3 * rng.normal(size=(12, 1)) + rng.normal(size=(1, 40)) + rng.normal(size=(12, 40))
        found = paired.crossed_interval(effects, resamples=200, seed=seed)
        crossed += found.low <= 0.5 <= found.high
        over_seeds = paired.interval(effects.mean(axis=1), method="t")
        seeds_only += over_seeds.low <= 0.5 <= over_seeds.high
    assert crossed >= 70
    assert seeds_only < 65


@pytest.mark.parametrize("pairs", [2, 3, 5])
def test_crossed_interval_covers_the_truth_with_few_seeds(pairs):
    rng, held = np.random.default_rng(pairs), 0
    for seed in range(100):
        effects = 0.5 + 0.1 * rng.normal(size=(pairs, 1)) + 0.1 * rng.normal(size=(pairs, 100))
        found = paired.crossed_interval(effects, resamples=200, seed=seed)
        held += found.low <= 0.5 <= found.high
    assert held >= 91


def test_one_seed_says_nothing_about_other_seeds():
    assert not paired.crossed_interval(0.1 + 0.01 * normal(1, 50)).excludes_zero


def test_crossed_interval_sees_pairs_as_well_as_rows():
    by_pair = np.repeat(normal(12, 1), 40, axis=1)  # the rows all say the same
    found = paired.crossed_interval(by_pair)
    means = paired.interval(by_pair[:, 0], method="bca")
    assert found.high - found.low == pytest.approx(means.high - means.low, rel=0.15)


def test_crossed_interval_equals_a_plain_resampling():
    effects, rng = normal(6, 20), np.random.default_rng(1)
    means = [effects[rng.integers(6, size=6)][:, rng.integers(20, size=20)].mean() for _ in range(2000)]
    found, narrow = paired.crossed_interval(effects), paired.crossed_interval(effects, confidence=0.5)
    spread = np.std(means)
    assert [found.low, found.high] == pytest.approx(list(np.quantile(means, [0.025, 0.975])), abs=0.25 * spread)
    assert [narrow.low, narrow.high] == pytest.approx(list(np.quantile(means, [0.25, 0.75])), abs=0.25 * spread)


def test_every_seed_of_every_task_counts_once_in_a_crossed_interval():
    found = paired.crossed_interval(np.full((2, 5), 0.2), np.full((1, 30), 0.8))
    assert (found.estimate, found.low, found.high, found.pairs) == (*[pytest.approx(0.4)] * 3, 3)


def test_rows_of_different_tasks_are_resampled_apart():
    rows = normal(1, 40)
    one = paired.crossed_interval(np.repeat(rows, 3, axis=0))
    two = paired.crossed_interval(*[np.repeat(rows, 3, axis=0)] * 2)
    assert two.estimate == pytest.approx(one.estimate)
    assert two.high - two.low == pytest.approx((one.high - one.low) / math.sqrt(2), rel=0.1)


def test_crossed_interval_of_a_constant_and_its_seed():
    found = paired.crossed_interval(np.full((3, 7), 0.25), resamples=50)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    effects = normal(4, 9)
    assert paired.crossed_interval(effects, seed=1) == paired.crossed_interval(effects, seed=1)
    assert paired.crossed_interval(effects, seed=1) != paired.crossed_interval(effects, seed=2)


# -- paired: tests ----------------------------------------------------------------------------------------------------


def swapped(values: np.ndarray) -> float:
    """Two-sided p over all assignments of signs."""
    signs = np.array(list(itertools.product([1, -1], repeat=len(values))))
    means = np.abs(signs @ values) / len(values)
    return float((means >= abs(values.mean()) - 1e-9).mean())


@pytest.mark.parametrize("pairs", range(2, 14))
def test_smallest_p_is_that_of_one_sign_throughout(pairs):
    values = np.abs(normal(pairs, seed=pairs)) + 0.1
    assert paired.p_value(values) == pytest.approx(2 / 2**pairs)
    assert paired.p_value(-values) == pytest.approx(2 / 2**pairs)


@pytest.mark.parametrize(
    "values, p",
    [
        ([1, 2], 0.5),  # 3, 1, -1, -3
        ([1, -2], 1.0),
        ([1, 2, 3], 0.25),
        ([3, 2, -1], 0.5),  # |4| or more: 6, 4, -4, -6 of eight
        ([1, 1, 1, -1], 0.625),  # |2| or more: all but the 6 sums that are 0
        ([1, 1, 0], 0.5),  # swapping a zero changes nothing
        ([0.1, 0.2, -0.3], 1.0),  # the mean is 0, up to rounding
    ],
)
def test_p_by_hand(values, p):
    assert paired.p_value(values) == pytest.approx(p)
    assert paired.p_value([-v for v in values]) == pytest.approx(p)


@pytest.mark.parametrize("pairs", [3, 6, 9, 13])
def test_p_is_exact_with_and_without_ties(pairs):
    rng = np.random.default_rng(pairs)
    for values in (rng.normal(0.3, 1, pairs), rng.integers(-2, 4, pairs) / 10):
        assert paired.p_value(values) == pytest.approx(swapped(values))


def test_p_is_near_the_exact_one_with_more_pairs():
    values = normal(14) + 0.4
    assert 0.02 < swapped(values) < 0.5
    assert paired.p_value(values) == pytest.approx(swapped(values), rel=0.15)


@pytest.mark.parametrize("values", [[], [0.7], [0.0] * 5, [0.0, 0.0]])
def test_nothing_to_test_gives_one(values):
    assert paired.p_value(values) == 1.0


def test_false_positives_stay_near_the_nominal_rate():
    found = np.array([paired.p_value(values) for values in normal(400, 8)])
    # 6/128 is the largest rate at or below 0.05 that eight pairs allow
    assert 0.02 < (found <= 0.05).mean() < 0.08
    assert 0.15 < (found <= 0.2).mean() < 0.26


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_p_is_never_below_its_smallest_value(bad):
    try:
        found = paired.p_value([bad, 1.0, 2.0, 3.0])
    except ValueError:
        return
    assert not found < 2 / 2**4


@pytest.mark.parametrize(
    "raw, holm",
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 4 x 0.005, 3 x 0.01, 2 x 0.03, never falling
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
    ],
)
def test_holm_by_hand(raw, holm):
    assert paired.corrected(raw) == pytest.approx(holm)


# -- Shapley ----------------------------------------------------------------------------------------------------------

FOUR = ["data", "form", "loss", "site"]


def coalitions(factors: list[str]) -> list[frozenset[str]]:
    return [frozenset(c) for size in range(len(factors) + 1) for c in itertools.combinations(factors, size)]


def test_shapley_equals_shapiq_on_random_games():
    import shapiq  # seconds to import, and for this test alone

    rng = np.random.default_rng(0)
    games = {coalition: rng.normal(size=5) for coalition in coalitions(FOUR)}
    ours = shapley(games.__getitem__, FOUR)
    for pair in range(5):

        def game(rows: np.ndarray, pair: int = pair) -> np.ndarray:
            return np.array([games[frozenset(itertools.compress(FOUR, row))][pair] for row in rows])

        theirs = shapiq.ExactComputer(n_players=4, game=game)("SV")
        assert [ours[f][pair] for f in FOUR] == pytest.approx([theirs[(i,)] for i in range(4)])


def test_shapley_is_the_mean_over_the_orders_of_moving():
    rng = np.random.default_rng(1)
    games = {coalition: rng.normal(size=2) for coalition in coalitions(FOUR)}
    expected = {f: np.zeros(2) for f in FOUR}
    for order in itertools.permutations(FOUR):
        for i, f in enumerate(order):
            expected[f] += (games[frozenset(order[: i + 1])] - games[frozenset(order[:i])]) / 24
    found = shapley(games.__getitem__, FOUR)
    for f in FOUR:
        np.testing.assert_allclose(found[f], expected[f])


def test_two_factors_by_hand():
    score = {
        frozenset(): np.array([0.5, 0.0]),
        frozenset({"a"}): np.array([0.6, 1.0]),
        frozenset({"b"}): np.array([0.8, 0.0]),
        frozenset({"a", "b"}): np.array([1.0, 4.0]),
    }
    found = shapley(score.__getitem__, ["a", "b"])
    # a first gives 0.1 and 1, a last gives 0.2 and 4; b first 0.3 and 0, b last 0.4 and 3
    np.testing.assert_allclose(found["a"], [0.15, 2.5])
    np.testing.assert_allclose(found["b"], [0.35, 1.5])


def test_one_factor_and_none():
    score = {frozenset(): np.array([1.0, 2.0]), frozenset({"a"}): np.array([4.0, 1.0])}
    np.testing.assert_allclose(shapley(score.__getitem__, ["a"])["a"], [3.0, -1.0])
    assert shapley(score.__getitem__, []) == {}


def test_shares_add_up_to_the_gap_and_an_idle_factor_gets_nothing():
    rng = np.random.default_rng(2)
    scores = {c: rng.normal(size=6) for c in coalitions(FOUR[:3])}
    scores |= {c | {"site"}: scores[c] for c in coalitions(FOUR[:3])}  # site does nothing
    found = shares(scores, FOUR)
    gap = scores[frozenset(FOUR)] - scores[frozenset()]
    assert sum(share.estimate for share in found.values()) == pytest.approx(gap.mean())
    assert found["site"] == paired.Interval(0.0, 0.0, 0.0, 6, "t")
    per_pair = shapley(scores.__getitem__, FOUR)
    np.testing.assert_allclose(sum(per_pair.values()), gap)
    assert found["form"] == paired.interval(per_pair["form"])


def test_factors_in_the_same_role_get_the_same():
    found = shapley(lambda c: np.array([len(c) ** 2.0]), FOUR)
    for f in FOUR:
        np.testing.assert_allclose(found[f], [4.0])


# -- curves -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(curves, "RESAMPLES", 250)  # a fifth of them is drawn, each an isotonic regression


def test_area_between_two_points_is_their_mean():
    first, second = [[0.6, 0.9], [0.5, 0.8], [0.7, 0.7]], [[0.5, 0.6], [0.5, 0.6], [0.6, 0.8]]
    found = curves.area_between([4, 64], first, second)
    assert found.estimate == pytest.approx(np.mean([0.2, 0.1, 0.0]))
    by_hand = paired.interval([0.2, 0.1, 0.0])
    assert (found.low, found.high, found.pairs) == (pytest.approx(by_hand.low), pytest.approx(by_hand.high), 3)


def test_area_between_points_that_are_apart_unequally():
    # widths 1 and 3 in doublings: ((0.1 + 0.3) / 2 * 1 + (0.3 + 0.7) / 2 * 3) / 4
    found = curves.area_between([4, 8, 64], [[0.5, 0.8, 1.2]] * 2, [[0.4, 0.5, 0.5]] * 2)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.425, 0.425, 0.425))


def test_area_of_one_point_and_of_a_constant_gap():
    assert curves.area_between([8], [[0.5], [0.7]], [[0.4], [0.4]]).estimate == pytest.approx(0.2)
    baseline = normal(3, 4)
    assert curves.area_between([2, 5, 6, 90], baseline + 0.1, baseline).estimate == pytest.approx(0.1)
    swapped_arms = curves.area_between([2, 5, 6, 90], baseline, baseline + 0.1)
    assert swapped_arms.estimate == pytest.approx(-0.1)


def test_area_of_a_missing_score_is_an_error():
    with pytest.raises(ValueError, match="not finite"):
        curves.area_between([4, 8], [[1.0, math.nan]], [[0.0, 0.0]])


@pytest.mark.parametrize(
    "reached, n",
    [
        (-0.1, 0.0),
        (0.0, 4.0),
        (0.25, 8.0),  # half the way from 4 to 16, on the log axis
        (0.5, 16.0),
        (0.75, 32.0),
        (1.0, 64.0),
        (1.1, math.inf),
    ],
)
def test_n_equivalence_by_hand(fewer_resamples, reached, n):
    found = curves.n_equivalence([4, 16, 64], [[0.0, 0.5, 1.0]] * 3, [reached] * 3)
    assert (found.estimate, found.low, found.high) == pytest.approx((n, n, n))
    assert (found.smallest, found.largest) == (4, 64)


@pytest.mark.parametrize("reached, n", [(0.25, math.sqrt(8)), (0.5, 4.0), (0.75, 8 * math.sqrt(2))])
def test_n_equivalence_of_a_baseline_that_falls_once(fewer_resamples, reached, n):
    # made monotone the baseline is 0, 0.5, 0.5, 1: its plateau is reached where it starts
    found = curves.n_equivalence([2, 4, 8, 16], [[0.0, 0.6, 0.4, 1.0]] * 2, [reached] * 2)
    assert found.estimate == pytest.approx(n)


def test_n_equivalence_with_one_size_only_says_before_or_after():
    baseline = [[0.5], [0.7]]
    assert str(curves.n_equivalence([8], baseline, [0.4, 0.5])).startswith("<= 8 [")
    assert str(curves.n_equivalence([8], baseline, [0.8, 0.9])) == "> 8 [> 8, > 8]"


def test_interval_of_n_equivalence_follows_that_of_the_score(monkeypatch):
    monkeypatch.setattr(curves, "RESAMPLES", 2000)
    reached = np.clip(0.5 + 0.1 * normal(8), 0.05, 0.95)
    found = curves.n_equivalence([4, 16, 64], [[0.0, 0.5, 1.0]] * 8, reached)
    # the baseline never varies and is straight on the log axis, so n is a function of the mean score alone
    scores = stats.bootstrap((reached,), np.mean, method="percentile", rng=1).confidence_interval
    assert found.estimate == pytest.approx(4 * 16 ** reached.mean())
    assert found.low == pytest.approx(4 * 16**scores.low, rel=0.1)
    assert found.high == pytest.approx(4 * 16**scores.high, rel=0.1)
    narrow = curves.n_equivalence([4, 16, 64], [[0.0, 0.5, 1.0]] * 8, reached, confidence=0.5)
    assert found.low < narrow.low < narrow.high < found.high


def test_an_interval_can_be_censored_on_one_side(monkeypatch):
    monkeypatch.setattr(curves, "RESAMPLES", 1000)
    baseline = [[0.0, 0.5, 1.0]] * 6
    high = curves.n_equivalence([4, 16, 64], baseline, [0.5, 0.5, 0.5, 1.4, 1.4, 1.4])
    assert 4 < high.low < high.estimate < 64 and high.high == math.inf
    assert str(high).endswith(", > 64]")
    low = curves.n_equivalence([4, 16, 64], baseline, [-0.4, -0.4, -0.4, 0.5, 0.5, 0.5])
    assert low.low == 0 and 4 < low.estimate < low.high < 64
    assert "[<= 4, " in str(low)


@pytest.mark.parametrize("size", range(4))
def test_identical_arms_need_their_own_n(fewer_resamples, size):
    baseline = np.array([0.1, 0.3, 0.5, 0.7]) + 0.02 * normal(6, 4)
    found = curves.n_equivalence([4, 8, 16, 64], baseline, baseline[:, size])
    assert (found.estimate, found.low, found.high) == pytest.approx(([4, 8, 16, 64][size],) * 3)


def test_n_equivalence_as_text():
    assert str(curves.Equivalence(11.3137, 0.0, math.inf, 4, 64)) == "11.3 [<= 4, > 64]"
    assert str(curves.Equivalence(math.inf, 32.0, math.inf, 4, 64)) == "> 64 [32, > 64]"
    assert str(curves.Equivalence(0.0, 0.0, 4.0, 4, 64)) == "<= 4 [<= 4, 4]"


# -- factorial: matched effects ---------------------------------------------------------------------------------------


def make_cells(score, factors, tasks=("t",), seeds=range(6), examples=(8,), noise=0.05, seed=0) -> pd.DataFrame:
    """A full grid whose measure is `score(levels)` plus noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for task, s, n, levels in itertools.product(tasks, seeds, examples, designs.full(factors)):
        rows.append({**levels, "task": task, "seed": s, "examples": n, "m": score(levels) + noise * rng.normal()})
    return pd.DataFrame(rows)


TWO = {"a": ["x", "y"], "b": ["p", "q"]}
THREE = {**TWO, "c": ["r", "s"]}


def planted(levels: dict[str, str]) -> float:
    return 0.3 * (levels["a"] == "y")


def test_effects_by_hand():
    rows = [
        # task t, task u
        ("x", "p", 0.1, 0.2),
        ("y", "p", 0.2, 0.5),
        ("z", "p", 0.7, 1.0),
        ("x", "q", 0.3, 0.1),
        ("y", "q", 0.6, 0.6),
    ]
    cells = pd.DataFrame(
        [
            {"a": a, "b": b, "task": task, "seed": 0, "examples": 8, "m": m}
            for a, b, *both in rows
            for task, m in zip("tu", both, strict=True)
        ]
    )
    y, z, q = factorial.effects(cells, ["a", "b"], "m")
    assert [(e.factor, e.level, e.reference, e.contexts) for e in (y, z, q)] == [
        ("a", "y", "x", 2),
        ("a", "z", "x", 1),  # run with p only
        ("b", "q", "p", 2),  # and so z has no q to compare with
    ]
    # y - x: (0.1 + 0.3) / 2 in t and (0.3 + 0.5) / 2 in u
    for effect, by_task in ((y, [0.2, 0.4]), (z, [0.6, 0.8]), (q, [0.3, 0.0])):
        expected = paired.interval(by_task)
        assert vars(effect.interval) == pytest.approx(vars(expected), abs=1e-12)
        assert effect.p == 1.0  # half at best with two pairs, and three were looked at


def test_inert_levels_are_compared_nowhere():
    runs = [("bias", "-", 0.5, 0.6), ("lora", "4", 0.7, 0.9), ("lora", "8", 0.75, 0.85)]
    cells = pd.DataFrame(
        [{"form": f, "rank": r, "seed": seed, "m": m[seed]} for f, r, *m in runs for seed in (0, 1)]
    ).assign(task="t", examples=8)
    (found,) = factorial.effects(cells, ["form", "rank"], "m")  # no rank has both forms
    assert (found.factor, found.level, found.reference, found.contexts) == ("rank", "8", "4", 1)
    assert found.interval.estimate == pytest.approx(0.0)


def holm(raw: list[float]) -> list[float]:
    """Holm, in the plainest words."""
    found, worst = [0.0] * len(raw), 0.0
    for place, i in enumerate(sorted(range(len(raw)), key=raw.__getitem__)):
        worst = max(worst, min(1.0, (len(raw) - place) * raw[i]))
        found[i] = worst
    return found


def plain_effects(cells: pd.DataFrame, factors: list[str], measure: str) -> list[tuple]:
    """Row by row: look for the row that differs in this factor only."""
    rows, found = cells.to_dict("records"), []
    for factor in factors:
        rest = [*[f for f in factors if f != factor], "task", "seed", "examples"]
        levels = [level for level in dict.fromkeys(row[factor] for row in rows) if level != "-"]
        for level in levels[1:]:
            gaps, contexts = defaultdict(list), set()
            for row, other in itertools.product(rows, rows):
                if row[factor] == level and other[factor] == levels[0] and all(row[c] == other[c] for c in rest):
                    gaps[row["task"], row["seed"]].append(row[measure] - other[measure])
                    contexts.add(tuple(row[f] for f in factors if f != factor))
            if gaps:
                pairs = [float(np.mean(gaps[key])) for key in sorted(gaps)]
                found.append((factor, level, levels[0], paired.interval(pairs), paired.p_value(pairs), len(contexts)))
    together = holm([one[4] for one in found])
    return [(*one[:4], p, one[5]) for one, p in zip(found, together, strict=True)]


def test_effects_equal_a_plain_search_in_a_grid_with_holes_and_inert_levels():
    factors = {"form": ["lora", "bias"], "rank": ["8", "4", "2"], "init": ["zeros", "mean"]}
    # the planted order of levels is not the alphabetical one
    cells = make_cells(
        lambda c: 0.2 * (c["form"] == "bias") + 0.4 * (c["init"] == "mean") * (c["form"] == "lora"),
        factors,
        tasks="tu",
        seeds=range(4),
        examples=(4, 16),
    )
    cells.loc[cells["form"] == "bias", "rank"] = "-"
    cells = cells.drop_duplicates(["form", "rank", "init", "task", "seed", "examples"])
    cells = cells.sample(frac=0.85, random_state=0).reset_index(drop=True)
    found = factorial.effects(cells, [*factors], "m")
    expected = plain_effects(cells, [*factors], "m")
    assert [(e.factor, e.level, e.reference, e.contexts) for e in found] == [(*e[:3], e[5]) for e in expected]
    assert {e.factor for e in found} == {"rank", "init"}  # bias has no rank, so no form has a partner
    for ours, plain in zip(found, expected, strict=True):
        assert vars(ours.interval) == pytest.approx(vars(plain[3]), abs=1e-9)
        assert ours.p == pytest.approx(plain[4])
    assert min(e.p for e in found if e.factor == "init") < 0.05


def test_effects_of_one_factor_and_of_none():
    cells = make_cells(planted, {"a": ["x", "y"]})
    (found,) = factorial.effects(cells, ["a"], "m")
    assert (found.contexts, found.interval.pairs) == (1, 6)
    assert found.p == pytest.approx(2 / 2**6)
    assert factorial.effects(cells[cells["a"] == "x"], ["a"], "m") == []
    assert factorial.effects(cells, [], "m") == []


def test_examples_are_matched_and_then_averaged_within_the_pair():
    cells = make_cells(planted, {"a": ["x", "y"]}, examples=(4, 16))
    cells = cells[(cells["examples"] == 4) | (cells["a"] == "x")]  # y was run with 4 only
    (found,) = factorial.effects(cells, ["a"], "m")
    four = cells[cells["examples"] == 4].pivot(index="seed", columns="a", values="m")
    assert found.interval == paired.interval(four["y"] - four["x"])


def test_a_cell_without_the_measure_is_matched_with_nothing():
    cells = make_cells(planted, TWO)
    cells.loc[cells.index[-2:], "m"] = math.nan
    kept = factorial.effects(cells.dropna(), [*TWO], "m")
    assert [e.interval.pairs for e in kept] == [5, 6]  # the last seed has no y any more, and x with both b
    assert factorial.effects(cells, [*TWO], "m") == kept


# -- factorial: analysis of variance ----------------------------------------------------------------------------------


def test_anova_of_two_equal_groups_is_f_oneway_but_for_hc3():
    """With two groups of n, HC3 multiplies the classical F by (n - 1) / n."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=9), rng.normal(size=9) + 1
    cells = pd.DataFrame({"a": ["x"] * 9 + ["y"] * 9, "m": [*x, *y]}).assign(task="t", seed=0, examples=8)
    table = factorial.anova(cells, ["a"], "m")
    assert list(table.index) == ["a"]
    f = stats.f_oneway(x, y).statistic * 8 / 9
    assert table.loc["a", "F"] == pytest.approx(f)
    assert table.loc["a", "p"] == pytest.approx(stats.f.sf(f, 1, 16))
    assert table.loc["a", "df"] == 1
    assert table.loc["a", "share"] == pytest.approx(f / (f + 16))  # partial eta squared


def hc3_f(design: np.ndarray, m: np.ndarray, tested: list[int]) -> float:
    """Wald test of some columns with HC3 errors, in plain linear algebra."""
    inverse = np.linalg.inv(design.T @ design)
    beta = inverse @ design.T @ m
    leverage = np.einsum("ij,jk,ik->i", design, inverse, design)
    weights = ((m - design @ beta) / (1 - leverage)) ** 2
    covariance = inverse @ (design.T * weights) @ design @ inverse
    chosen = covariance[np.ix_(tested, tested)]
    return float(beta[tested] @ np.linalg.solve(chosen, beta[tested]) / len(tested))


def test_anova_of_one_factor_with_pairs_as_blocks_equals_plain_algebra():
    cells = make_cells(planted, {"a": ["x", "y", "z"]}, tasks="tu", seeds=range(3), examples=(4, 8))
    cells["m"] += cells["task"].eq("u") * 0.5 + cells["seed"] * 0.1 - cells["examples"] * 0.02
    blocks = pd.get_dummies(cells["task"] + cells["seed"].astype(str) + "/" + cells["examples"].astype(str))
    assert blocks.shape[1] == 12
    levels = pd.get_dummies(cells["a"], drop_first=True)
    design = np.column_stack([levels, blocks]).astype(float)
    table = factorial.anova(cells, ["a"], "m")
    f = hc3_f(design, cells["m"].to_numpy(), [0, 1])
    residual = len(cells) - 12 - 2
    assert (table.loc["a", "F"], table.loc["a", "df"]) == (pytest.approx(f), 2)
    assert table.loc["a", "p"] == pytest.approx(stats.f.sf(f, 2, residual))
    assert table.loc["a", "share"] == pytest.approx(2 * f / (2 * f + residual))


def sum_coded(cells: pd.DataFrame) -> np.ndarray:
    """Columns of a, b and a x b as -1 and 1, and a column for each seed."""
    a, b = (np.where(cells[f].eq(TWO[f][1]), 1.0, -1.0) for f in TWO)
    return np.column_stack([a, b, a * b, pd.get_dummies(cells["seed"])]).astype(float)


def test_interaction_of_the_anova_equals_plain_algebra():
    cells = make_cells(planted, TWO)
    table = factorial.anova(cells, [*TWO], "m")
    f = hc3_f(sum_coded(cells), cells["m"].to_numpy(), [2])
    assert table.loc["a x b", "F"] == pytest.approx(f)
    assert table.loc["a x b", "p"] == pytest.approx(stats.f.sf(f, 1, 24 - 9))


def test_interactions_of_factors_with_several_levels_equal_a_direct_call():
    cells = make_cells(planted, {"a": ["x", "y"], "b": ["p", "q", "r"]}, tasks="tu", seeds=range(3))
    cells = cells.assign(pair=cells["task"] + cells["seed"].astype(str))
    fitted = smf.ols("m ~ C(a, Sum) * C(b, Sum) + C(pair)", data=cells).fit()
    theirs = anova_lm(fitted, typ=3, robust="hc3").loc["C(a, Sum):C(b, Sum)"]
    table = factorial.anova(cells, ["a", "b"], "m")
    assert list(table.index) == ["a", "b", "a x b"]
    assert list(table["df"]) == [1, 2, 2]
    assert (table.loc["a x b", "F"], table.loc["a x b", "p"]) == pytest.approx((theirs["F"], theirs["PR(>F)"]))


def test_anova_finds_a_planted_main_effect_and_nothing_else():
    table = factorial.anova(make_cells(planted, THREE, tasks="tu", seeds=range(3)), [*THREE], "m")
    assert list(table.index) == ["a", "b", "c", "a x b", "a x c", "b x c"]
    assert list(table.index[table["p"] < 0.01]) == ["a"]
    assert table.loc["a", "share"] > 0.5 > 0.2 > table["share"].drop("a").max()


def interacting(levels: dict[str, str]) -> float:
    return 0.3 * (levels["a"] == "y") + 0.2 * ((levels["b"] == "q") == (levels["c"] == "s"))


def test_anova_finds_a_planted_interaction():
    table = factorial.anova(make_cells(interacting, THREE, tasks="tu", seeds=range(3)), [*THREE], "m")
    assert table.loc["b x c", "p"] < 1e-4 and table.loc["a", "p"] < 1e-4
    assert table["p"][["a x b", "a x c"]].min() > 0.01


def test_an_interaction_changes_nothing_about_balanced_main_effects():
    # all columns are orthogonal: what is added to one term leaves the others and the residuals as they were
    cells = make_cells(planted, TWO)
    more = cells.assign(m=cells["m"] + 0.5 * sum_coded(cells)[:, 2])
    first, second = (factorial.anova(c, [*TWO], "m").loc[["a", "b"], "F"] for c in (cells, more))
    assert list(second) == pytest.approx(list(first))


def test_main_effects_of_the_anova_equal_plain_algebra():
    cells = make_cells(planted, TWO)
    table = factorial.anova(cells, [*TWO], "m")
    design, m = sum_coded(cells), cells["m"].to_numpy()
    assert list(table["F"]) == pytest.approx([hc3_f(design, m, [i]) for i in range(3)])


def test_a_planted_interaction_makes_no_main_effects():
    grids = [make_cells(lambda c: 0.2 * ((c["a"] == "y") == (c["b"] == "q")), TWO, seed=seed) for seed in range(20)]
    found = np.array([factorial.anova(cells, [*TWO], "m").loc[["a", "b"], "p"] for cells in grids])
    assert (found < 0.05).mean() < 0.15  # it is a third or more


def test_anova_has_false_positives_at_about_the_nominal_rate():
    found = [factorial.anova(make_cells(lambda c: 0.0, TWO, seed=seed), [*TWO], "m")["p"] for seed in range(30)]
    assert 0.005 < (np.array(found) < 0.05).mean() < 0.11


def test_blocks_take_what_pairs_have_in_common():
    cells = make_cells(planted, TWO, tasks="tu")
    shifted = cells.assign(m=cells["m"] + 3.0 * cells["task"].eq("u") + cells["seed"] ** 2)
    first, second = factorial.anova(cells, [*TWO], "m"), factorial.anova(shifted, [*TWO], "m")
    np.testing.assert_allclose(first["F"], second["F"])


def test_anova_leaves_inert_cells_out():
    factors = {"rank": ["4", "8"], "init": ["zeros", "mean"]}
    cells = make_cells(lambda c: 0.3 * (c["rank"] == "8"), factors)
    inert = make_cells(lambda c: 9.0, {"rank": ["-"], "init": ["zeros", "mean"]})
    expected = factorial.anova(cells, [*factors], "m")
    pd.testing.assert_frame_equal(factorial.anova(pd.concat([cells, inert]), [*factors], "m"), expected)


def test_anova_drops_the_interactions_when_there_are_too_few_cells_for_them():
    cells = make_cells(planted, THREE, seeds=[0])
    assert list(factorial.anova(cells, [*THREE], "m").index) == ["a", "b", "c"]


def test_a_factor_that_does_not_vary_has_no_row():
    cells = make_cells(planted, {**TWO, "c": ["r"]})
    assert list(factorial.anova(cells, ["a", "b", "c"], "m").index) == ["a", "b", "a x b"]


@pytest.mark.parametrize(
    "factors, seeds",
    [
        ({"a": ["x"], "b": ["p"]}, range(6)),  # nothing varies
        ({"a": ["x", "-"], "b": ["p", "-"]}, range(6)),  # nothing varies but in inert cells
        ({"a": ["-"], "b": ["p", "q"]}, range(6)),  # every cell is inert
        (TWO, [0]),  # as many parameters as cells
    ],
)
def test_anova_of_nothing_to_compare_is_none(factors, seeds):
    assert factorial.anova(make_cells(lambda c: 0.0, factors, seeds=seeds), ["a", "b"], "m") is None


def test_anova_leaves_a_cell_without_the_measure_out():
    cells = make_cells(planted, TWO)
    cells.loc[[0, 5], "m"] = math.nan
    expected = factorial.anova(cells.dropna(), [*TWO], "m")
    pd.testing.assert_frame_equal(factorial.anova(cells, [*TWO], "m"), expected)


def runs(cells: pd.DataFrame) -> pd.Series:
    """How many of a, b and c are at their second level."""
    return sum(cells[f].eq(levels[1]).astype(int) for f, levels in THREE.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("design", ["half fraction", "one at a time", "a missing combination"])
def test_anova_of_a_design_with_holes_finds_the_planted_effect_only(design):
    cells = make_cells(planted, THREE)
    if design == "half fraction":
        cells = cells[runs(cells) % 2 == 0]
    elif design == "one at a time":
        cells = cells[runs(cells) <= 1]
    else:
        cells = cells[~(cells["a"].eq("y") & cells["b"].eq("q"))]
    table = factorial.anova(cells, [*THREE], "m")
    assert table.loc["a", "p"] < 1e-4
    assert not (table["p"].drop("a") < 0.005).any()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("score", ["constant", "exactly additive"])
def test_anova_finds_nothing_in_rounding_errors(score):
    for height in (0.1, 0.3, 0.7, 0.9):
        cells = make_cells(lambda c, h=height: h + (h * planted(c) if score != "constant" else 0.0), TWO, noise=0.0)
        table = factorial.anova(cells, [*TWO], "m")
        assert table is None or not (table["F"].drop("a" if score != "constant" else []) > 1e-3).any()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, analysis", [("block", factorial.anova), ("pair", factorial.mixed_model)])
def test_a_factor_can_have_any_name(name, analysis):
    cells = make_cells(planted, TWO)
    expected = analysis(cells, ["a", "b"], "m")
    found = analysis(cells.rename(columns={"a": name}), [name, "b"], "m")
    assert list(found.to_numpy().ravel()) == pytest.approx(list(expected.to_numpy().ravel()))


# -- factorial: mixed model -------------------------------------------------------------------------------------------


def test_mixed_model_of_a_balanced_grid_equals_the_paired_analysis():
    cells = make_cells(planted, TWO, seeds=range(12), noise=0.1)
    cells["m"] += cells["seed"].map(dict(enumerate(0.3 * normal(12, seed=5))))
    table = factorial.mixed_model(cells, [*TWO], "m")
    assert list(table.index) == ["a=y", "b=q"]
    for name, factor, (first, second) in (("a=y", "a", "xy"), ("b=q", "b", "pq")):
        means = cells.groupby(factor)["m"].mean()
        assert table.loc[name, "estimate"] == pytest.approx(means[second] - means[first], abs=1e-6)
        # in a balanced grid REML's residual variance is that of the model with the seeds as blocks
        residual = smf.ols("m ~ C(a) + C(b) + C(seed)", data=cells).fit().mse_resid
        half = 1.959964 * math.sqrt(2 * residual / 24)
        assert table.loc[name, "high"] - table.loc[name, "estimate"] == pytest.approx(half, rel=0.01)
        assert table.loc[name, "estimate"] - table.loc[name, "low"] == pytest.approx(half, rel=0.01)
    assert table.loc["a=y", "p"] < 1e-3 < 0.01 < table.loc["b=q", "p"]


@pytest.mark.parametrize("tasks, seeds", [("t", range(8)), ("tuv", range(3)), ("tuvwxy", [0])])
def test_mixed_model_recovers_a_planted_effect(tasks, seeds):
    cells = make_cells(planted, TWO, tasks=tasks, seeds=seeds, examples=(4, 16), seed=1)
    cells["m"] += cells["task"].map(dict(zip("tuvwxy", normal(6), strict=True))) + 0.2 * (cells["examples"] == 16)
    table = factorial.mixed_model(cells, [*TWO], "m")
    assert list(table.index) == ["a=y", "b=q"]  # the number of examples is accounted for, and not shown
    assert table.loc["a=y", "low"] < 0.3 < table.loc["a=y", "high"]
    assert table.loc["b=q", "low"] < 0.0 < table.loc["b=q", "high"]
    assert (table["high"] - table["low"] < 0.2).all()


def test_mixed_model_needs_pairs_and_something_that_varies():
    assert factorial.mixed_model(make_cells(planted, TWO, seeds=range(5)), [*TWO], "m") is None
    assert factorial.mixed_model(make_cells(planted, TWO, tasks="tu", seeds=range(2)), [*TWO], "m") is None
    assert factorial.mixed_model(make_cells(planted, TWO, seeds=range(5)), [*TWO], "m", enough=5) is not None
    assert factorial.mixed_model(make_cells(planted, {"a": ["x"], "b": ["p"]}), ["a", "b"], "m") is None
    # ten pairs, but five that are not inert
    cells = pd.concat([make_cells(planted, TWO, seeds=range(5)), make_cells(planted, {"a": ["x"], "b": ["-"]})])
    assert factorial.mixed_model(cells, [*TWO], "m") is None


def test_mixed_model_leaves_inert_cells_out():
    cells = make_cells(planted, TWO)
    inert = make_cells(lambda c: 9.0, {"a": ["x", "y"], "b": ["-"]})
    expected = factorial.mixed_model(cells, [*TWO], "m")
    pd.testing.assert_frame_equal(factorial.mixed_model(pd.concat([cells, inert]), [*TWO], "m"), expected)


def test_mixed_model_compares_with_the_factors_first_level():
    factors = {"a": ["y", "x"], "b": ["p", "q"]}
    table = factorial.mixed_model(make_cells(planted, factors), [*factors], "m")
    assert list(table.index) == ["a=x", "b=q"]
    assert table.loc["a=x", "estimate"] == pytest.approx(-0.3, abs=0.1)


# -- designs ----------------------------------------------------------------------------------------------------------


def levels_of(*sizes: int) -> dict[str, list[str]]:
    return {f"f{i}": [f"l{j}" for j in range(size)] for i, size in enumerate(sizes)}


def test_full_is_the_product():
    assert designs.full({"a": ["x", "y"], "b": ["p", "q", "r"]}) == [
        {"a": "x", "b": "p"},
        {"a": "x", "b": "q"},
        {"a": "x", "b": "r"},
        {"a": "y", "b": "p"},
        {"a": "y", "b": "q"},
        {"a": "y", "b": "r"},
    ]
    assert len(designs.full(levels_of(2, 3, 4))) == 24


@pytest.mark.parametrize(
    "sizes, reduction",
    [((2, 2), 2), ((2, 2, 2), 2), ((2,) * 4, 2), ((2,) * 5, 2), ((3, 3), 3), ((3, 3, 3), 3), ((3,) * 4, 3)],
)
def test_a_fraction_is_balanced(sizes, reduction):
    factors = levels_of(*sizes)
    chosen = designs.fractional(factors, reduction)
    everything = designs.full(factors)
    assert len(chosen) == len(everything) / reduction
    assert all(c in everything for c in chosen)
    assert len({tuple(c.items()) for c in chosen}) == len(chosen)
    for factor, levels in factors.items():
        counts = Counter(c[factor] for c in chosen)
        assert counts == dict.fromkeys(levels, len(chosen) // len(levels))


@pytest.mark.parametrize("sizes, reduction", [((2, 3), 2), ((3, 3, 3), 2), ((2, 3, 4), 2), ((2, 3, 4), 3)])
def test_a_fraction_that_does_not_divide_is_nearly_balanced(sizes, reduction):
    factors = levels_of(*sizes)
    chosen = designs.fractional(factors, reduction)
    assert abs(len(chosen) - math.prod(sizes) / reduction) <= 1
    for factor, levels in factors.items():
        counts = Counter(c[factor] for c in chosen)
        assert set(counts) == set(levels)
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("reduction", [1, 0, -3])
def test_a_reduction_that_reduces_nothing_is_an_error(reduction):
    with pytest.raises(ValueError, match=f"design.reduction={reduction} reduces nothing.*2 or more"):
        designs.fractional(TWO, reduction)


@pytest.mark.parametrize("sizes", [(2, 2), (2, 2, 2)])
def test_a_reduction_that_leaves_no_design_is_an_error(sizes):
    with pytest.raises(ValueError, match="design.reduction=9"):
        designs.fractional(levels_of(*sizes), 9)


def test_no_fraction_of_one_factor():
    with pytest.raises(ValueError, match="two factors or more"):
        designs.fractional({"a": ["x", "y", "z"]}, 2)


def test_a_half_fraction_of_three_factors_aliases_every_main_effect_with_a_pair():
    told = ["a cannot be told from b x c", "b cannot be told from a x c", "c cannot be told from a x b"]
    assert designs.aliases(designs.fractional(THREE, 2), THREE) == told
    signs = {levels[1]: 1 for levels in THREE.values()}
    for product in (0, 1):  # both halves that c = a x b defines
        half = [c for c in designs.full(THREE) if sum(signs.get(level, 0) for level in c.values()) % 2 == product]
        assert len(half) == 4
        assert designs.aliases(half, THREE) == told


@pytest.mark.parametrize("sizes", [(2, 2), (2, 2, 2), (2, 3, 4), (3, 3, 3), (2, 2, 2, 2)])
def test_a_full_factorial_aliases_nothing(sizes):
    factors = levels_of(*sizes)
    assert designs.aliases(designs.full(factors), factors) == []


def test_a_half_fraction_of_four_factors_aliases_no_main_effect_with_a_pair():
    factors = levels_of(2, 2, 2, 2)
    assert designs.aliases(designs.fractional(factors, 2), factors) == []


def test_a_planted_alias_is_the_only_one_named():
    factors = levels_of(2, 2, 2, 2)
    at = {"l0": 0, "l1": 1}
    chosen = [c for c in designs.full(factors) if at[c["f3"]] == at[c["f0"]] ^ at[c["f1"]]]
    assert designs.aliases(chosen, factors) == [
        "f0 cannot be told from f1 x f3",
        "f1 cannot be told from f0 x f3",
        "f3 cannot be told from f0 x f1",
    ]


def test_one_missing_run_mixes_a_little():
    # over the seven runs left, a and b x c have covariance -8/49 and variance 48/49
    found = designs.aliases(designs.full(THREE)[:-1], THREE)
    assert [sentence for sentence in found if " x " in sentence] == [
        "a is mixed (r = 0.17) with b x c",
        "b is mixed (r = 0.17) with a x c",
        "c is mixed (r = 0.17) with a x b",
    ]


def test_partial_aliases_equal_a_plain_canonical_correlation():
    factors = levels_of(3, 3, 3)
    chosen = designs.fractional(factors, 2)
    columns = {f: pd.get_dummies([c[f] for c in chosen]).to_numpy(float) for f in factors}

    def contrast(f: str) -> np.ndarray:  # any coding of sums that are zero gives the same interaction
        return columns[f] @ np.array([[1.0, 1.0], [-1.0, 1.0], [0.0, -2.0]])

    def correlation(x: np.ndarray, y: np.ndarray) -> float:
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)
        squares = np.linalg.pinv(x.T @ x) @ x.T @ y @ np.linalg.pinv(y.T @ y) @ y.T @ x
        return math.sqrt(max(np.linalg.eigvals(squares).real))

    found = []
    for f, g, h in (("f0", "f1", "f2"), ("f1", "f0", "f2"), ("f2", "f0", "f1")):
        products = np.einsum("ri,rj->rij", contrast(g), contrast(h)).reshape(len(chosen), -1)
        found.append(f"{f} is mixed (r = {correlation(contrast(f), products):.2f}) with {g} x {h}")
    assert [sentence for sentence in designs.aliases(chosen, factors) if " x " in sentence] == found


def test_two_main_effects_that_always_move_together_are_named():
    chosen = designs.fractional(TWO, 2)
    assert len(chosen) == 2  # both factors are at their first level, or both at their second
    assert designs.aliases(chosen, TWO)


def test_one_at_a_time_by_hand():
    assert designs.one_at_a_time({"a": ["x", "y"], "b": ["p", "q", "r"]}, {"a": "y", "b": "q"}) == [
        {"a": "y", "b": "q"},
        {"a": "x", "b": "q"},
        {"a": "y", "b": "p"},
        {"a": "y", "b": "r"},
    ]


def test_add_one_in_by_hand():
    start, end = {"a": "x", "b": "p", "c": "r"}, {"a": "y", "b": "q", "c": "s"}
    assert designs.add_one_in(THREE, start, end) == [
        start,
        {"a": "y", "b": "p", "c": "r"},
        {"a": "x", "b": "q", "c": "r"},
        {"a": "x", "b": "p", "c": "s"},
        end,
        {"a": "x", "b": "q", "c": "s"},
        {"a": "y", "b": "p", "c": "s"},
        {"a": "y", "b": "q", "c": "r"},
    ]


def test_add_one_in_repeats_nothing_and_moves_only_what_differs():
    start = {"a": "x", "b": "p", "c": "r"}
    assert designs.add_one_in(THREE, start, start) == [start]
    assert designs.add_one_in(THREE, start, {**start, "b": "q"}) == [start, {**start, "b": "q"}]
    both = designs.add_one_in(THREE, start, {"a": "y", "b": "p", "c": "s"})
    assert both == [start, {**start, "a": "y"}, {**start, "c": "s"}, {"a": "y", "b": "p", "c": "s"}]


def test_an_unknown_factor_of_the_start_is_an_error():
    with pytest.raises(KeyError):
        designs.one_at_a_time(TWO, {"a": "x"})
    with pytest.raises(KeyError):
        designs.add_one_in(TWO, {"a": "x", "b": "p"}, {"a": "y"})


# -- matched strength -------------------------------------------------------------------------------------------------

KL = 0.1


def search(kl, largest: float, target: float = KL) -> tuple[float | None, list[float]]:
    """The strength, and the strengths that were tried."""
    tried: list[float] = []

    def counted(strength: float) -> float:
        tried.append(strength)
        return kl(strength)

    found = matched_strength(counted, target, largest)
    assert len(tried) < 25
    assert min(tried) > 0
    if largest >= 1:
        assert max(tried) <= largest * (1 + 1e-9)
    return found, tried


@pytest.mark.parametrize("strength", [*np.geomspace(1e-3, 900, 30), 999.0])
def test_a_quadratic_kl_is_matched_over_six_orders_of_magnitude(strength):
    c = KL / strength**2
    found, tried = search(lambda s: c * s**2, 1000.0)
    assert found == pytest.approx(math.sqrt(KL / c), rel=0.02)
    assert len(tried) <= 6  # the guess is exact


@pytest.mark.parametrize("target", [1e-6, 1e-3, 0.5, 20.0])
def test_any_target_is_matched(target):
    for c in (target / 50, target, target * 50):
        assert search(lambda s, c=c: c * s**2, 64.0, target)[0] == pytest.approx(math.sqrt(target / c), rel=0.02)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 3.0, 4.0, 8.0])
@pytest.mark.parametrize("strength", [0.02, 0.3, 1.0, 3.0, 63.0])
def test_other_powers_are_matched(power, strength):
    found, _ = search(lambda s: KL * (s / strength) ** power, 64.0)
    assert found == pytest.approx(strength, rel=0.02)


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


def test_a_kl_that_saturates_below_the_target_is_not_matched():
    assert search(lambda s: 0.05 * (1 - math.exp(-(s**2))), 64.0)[0] is None


@pytest.mark.parametrize("broken", [math.inf, math.nan])
@pytest.mark.parametrize("room", [1.05, 1.5, 10.0])
@pytest.mark.parametrize("strength", [0.02, 0.2, 0.9, 2.0, 30.0])
def test_a_kl_that_breaks_above_some_strength_is_matched_below(strength, room, broken):
    found, _ = search(lambda s: KL * (s / strength) ** 2 if s < room * strength else broken, 64.0)
    assert found == pytest.approx(strength, rel=0.02)


@pytest.mark.parametrize("value", [0.0, -1e-9, math.inf, math.nan])
def test_a_kl_that_never_comes_near_is_not_matched(value):
    assert search(lambda s: value, 64.0)[0] is None


@pytest.mark.parametrize("strength, largest", [(0.003, 64.0), (0.05, 8.0), (0.1, 1.0)])
def test_a_small_strength_is_found_whatever_the_largest(strength, largest):
    found, _ = search(lambda s: KL * (s / strength) ** 2, largest)
    assert found == pytest.approx(strength, rel=0.02)


@pytest.mark.parametrize("strength", [0.1, 0.25, 0.45])
def test_a_largest_strength_below_one_is_searched(strength):
    found, _ = search(lambda s: KL * (s / strength) ** 2, 0.5)
    assert found == pytest.approx(strength, rel=0.02)


def test_no_strength_above_the_largest_is_tried():
    assert max(search(lambda s: s**2, 0.5)[1]) <= 0.5


@pytest.mark.parametrize("above", [math.inf, math.nan, 4.0])
def test_a_kl_that_jumps_over_the_target_is_not_matched(above):
    assert search(lambda s: KL * s**2 if s < 0.5 else above, 64.0)[0] is None
