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
from scipy.linalg import helmert

from steertune.recipes.ablation import designs
from steertune.recipes.ablation.matched import Curve, frontier, refined
from steertune.recipes.ablation.statistics import curves, factorial, paired
from steertune.recipes.ablation.statistics.shapley import shapley, share_rows
from steertune.recipes.lab import intervals


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


@pytest.mark.parametrize("pairs, method", [(intervals.FEW, None), (45, None), (5, "bca")])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_many_pairs_get_the_bca_interval_of_scipy(pairs, method, confidence):
    values = np.exp(normal(pairs))  # skewed, where BCa differs from the percentiles
    found = intervals.interval(values, confidence=confidence, method=method, seed=3)
    theirs = stats.bootstrap(
        (values,), np.mean, confidence_level=confidence, n_resamples=9999, method="BCa", rng=3
    ).confidence_interval
    assert (found.low, found.high) == (theirs.low, theirs.high)
    assert (found.method, found.pairs, found.estimate) == ("bca", pairs, pytest.approx(values.mean()))


@pytest.mark.parametrize("pairs, method", [(2, None), (5, None), (intervals.FEW - 1, None), (20, "t")])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_few_pairs_get_students_t(pairs, method, confidence):
    values = normal(pairs, seed=pairs) + 0.3
    found = intervals.interval(values, confidence=confidence, method=method)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert (found.method, found.pairs) == ("t", pairs)


def test_the_seed_decides_the_bootstrap():
    values = normal(intervals.FEW)
    assert intervals.interval(values, seed=1) == intervals.interval(values, seed=1)
    assert intervals.interval(values, seed=1) != intervals.interval(values, seed=2)


def test_one_pair_says_nothing():
    found = intervals.interval([0.4])
    assert (found.estimate, found.low, found.high) == (0.4, -math.inf, math.inf)
    assert (found.pairs, found.method) == (1, "none")
    assert not found.excludes_zero


@pytest.mark.parametrize("pairs, method", [(3, "t"), (40, "bca")])
def test_no_difference_anywhere_is_no_difference(pairs, method):
    found = intervals.interval([0.0] * pairs)
    assert (found.estimate, found.low, found.high, found.method) == (0, 0, 0, method)


@pytest.mark.parametrize("pairs", [2, 3, 12])
@pytest.mark.parametrize("value", [0.25, -1.5])
def test_the_same_difference_everywhere_may_be_chance(pairs, value):
    """Accuracies of 32 rows are multiples of 1 / 32: two pairs have the same difference every so often."""
    found = intervals.interval([value] * pairs)
    assert (found.estimate, found.low, found.high, found.method) == (value, -math.inf, math.inf, "none")
    assert not found.excludes_zero and found.ends == "unknown"


def test_differences_that_are_equal_up_to_rounding_are_equal():
    # 0.8 - 0.6 is not 0.7 - 0.5 in floating point: the bootstrap has spread, but none that means anything
    found = intervals.interval([a / 10 - (a - 2) / 10 for a in (8, 7, 9, 6, 5, 4, 3, 8, 7, 6, 9, 10)])
    assert found.estimate == pytest.approx(0.2) and found.method == "none"


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf, 1.0, 2.0], [math.nan] * 12, [-math.inf]])
@pytest.mark.parametrize("function", [intervals.interval, paired.p_value])
def test_what_is_not_finite_is_an_error(function, bad):
    with pytest.raises(ValueError, match=f"{len(bad)} differences, .* not finite"):
        function(bad)


@pytest.mark.parametrize("low, high, excludes", [(0.5, 2, True), (-2, -0.5, True), (-1, 1, False), (0, 2, False)])
def test_excludes_zero_on_either_side_only(low, high, excludes):
    assert intervals.Interval(1, low, high, 3, "t").excludes_zero == excludes


def test_interval_as_text():
    assert str(intervals.Interval(2.0, -0.4841, 4.4841, 3, "t")) == "+2.000 [-0.484, +4.484]"


def test_t_covers_what_it_promises_with_few_pairs_and_bca_does_not(monkeypatch):
    """Why there is a FEW at all."""
    monkeypatch.setattr(paired, "RESAMPLES", 499)
    samples = normal(500, 5) + 0.7

    def coverage(method: str, repetitions: int) -> float:
        found = [intervals.interval(values, method=method) for values in samples[:repetitions]]
        return float(np.mean([i.low <= 0.7 <= i.high for i in found]))

    assert 0.92 < coverage("t", 500) < 0.98
    assert coverage("bca", 150) < 0.92


# -- paired: seeds and test rows at once ------------------------------------------------------------------------------


# seed means 2 and 4 (variance 2), row means 2, 3 and 4 (variance 1)
FIRST = [[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]
# seed means 1, 2 and 6 (variance 7), row means 2 and 4 (variance 2)
SECOND = [[0.0, 2.0], [1.0, 3.0], [5.0, 7.0]]


@pytest.mark.parametrize(
    "tasks, parts",  # variance and degrees of freedom; two of five seeds weigh (2 / 5) ** 2
    [
        ([FIRST], [(2 / 2, 1), (1 / 3, 2)]),
        ([FIRST, SECOND], [(0.16 * 2 / 2, 1), (0.16 * 1 / 3, 2), (0.36 * 7 / 3, 2), (0.36 * 2 / 2, 1)]),
    ],
)
@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_crossed_interval_by_hand(tasks, parts, confidence):
    found = paired.crossed_interval(*tasks, confidence=confidence)
    variance = sum(v for v, _ in parts)
    seeds = sum(len(task) - 1 for task in tasks)  # no more degrees of freedom than the seeds have
    freedom = min(seeds, variance**2 / sum(v**2 / n for v, n in parts))
    half = stats.t.ppf((1 + confidence) / 2, freedom) * math.sqrt(variance)
    assert (found.estimate, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half))
    assert (found.pairs, found.method) == (sum(map(len, tasks)), "crossed")


@pytest.mark.parametrize("thin", [(1, 50), (50, 1), (1, 1)])
def test_one_seed_or_one_row_of_any_task_says_nothing_about_others(thin):
    for tasks in ([normal(*thin)], [normal(5, 9), normal(*thin)]):
        found = paired.crossed_interval(*tasks)
        every_seed = np.concatenate([task.mean(axis=1) for task in tasks])
        assert (found.low, found.high, found.method) == (-math.inf, math.inf, "none")
        assert (found.estimate, found.pairs) == (pytest.approx(every_seed.mean()), len(every_seed))


@pytest.mark.parametrize("value, end", [(0.0, 0.0), (0.1, math.inf)])
def test_crossed_interval_of_a_constant_is_known_for_zero_only(value, end):
    found = paired.crossed_interval(np.full((3, 7), value), np.full((2, 5), value))
    assert (found.estimate, found.low, found.high) == (pytest.approx(value), -end, end)


def spread(parts: list[tuple[float, float]]) -> tuple[float, float]:
    """Variance and Satterthwaite's degrees of freedom of a sum of (variance, degrees of freedom)."""
    variance = sum(v for v, _ in parts)
    return variance, variance**2 / sum(v**2 / n for v, n in parts)


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_an_interval_over_seeds_by_hand(confidence):
    """Seeds vary within their task; that the second task's mean may be another is no variance."""
    for shift in (0.0, 100.0):
        found = paired.seeds_interval(FIRST, np.add(SECOND, shift), confidence=confidence)
        variance, freedom = spread([(0.16 * 2 / 2, 1), (0.36 * 7 / 3, 2)])
        half = stats.t.ppf((1 + confidence) / 2, freedom) * math.sqrt(variance)
        estimate = 3 + 0.6 * shift
        assert (found.estimate, found.low, found.high) == pytest.approx((estimate, estimate - half, estimate + half))
        assert (found.pairs, found.method) == (5, "t")


def test_an_interval_over_the_seeds_of_one_task_is_students_t():
    rows = normal(4, 9)
    assert vars(paired.seeds_interval(rows)) == pytest.approx(vars(intervals.interval(rows.mean(axis=1))))


def test_what_holds_for_others_holds_for_these():
    agreeing = [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]  # seeds that say nothing about how much they vary
    found, others = paired.seeds_interval(agreeing), paired.crossed_interval(agreeing)
    assert (found.low, found.high) == (others.low, others.high) and np.isfinite(found.low)
    alone = [[[0.2]], [[0.4]], [[0.9]]]  # a seed a task
    found, others = paired.seeds_interval(*alone), intervals.interval([0.2, 0.4, 0.9])
    assert (found.low, found.high) == pytest.approx((others.low, others.high))
    assert paired.crossed_interval(*alone).method == "none"


def as_task(mean: float, seeds: int = 3) -> np.ndarray:
    """Differences with this mean that hardly vary, `(seeds, 4)`."""
    rows = 1e-4 * normal(seeds, 4)
    return mean + rows - rows.mean()


def test_an_interval_over_tasks_is_students_t_over_their_means():
    found = paired.tasks_interval(*map(as_task, (-0.346, -0.206, -0.018)))
    assert (found.estimate, found.low, found.high) == pytest.approx((-0.190, -0.599, 0.219), abs=5e-4)
    theirs = stats.ttest_1samp([-0.346, -0.206, -0.018], 0)
    assert (found.p, found.pairs, found.method) == (pytest.approx(theirs.pvalue, rel=1e-3), 9, "tasks")
    two = paired.tasks_interval(as_task(0.1), as_task(0.3))
    half = 12.706 * 0.1  # a single degree of freedom
    assert (two.low, two.high) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-3)


def test_a_task_weighs_as_much_as_its_pairs():
    found = paired.tasks_interval(as_task(0.1, 2), as_task(0.4, 4))
    half = 12.706 * math.sqrt(2 * ((0.1 - 0.3) ** 2 / 9 + 4 * (0.4 - 0.3) ** 2 / 9))
    assert (found.estimate, found.low, found.high) == pytest.approx((0.3, 0.3 - half, 0.3 + half), abs=1e-3)


def test_tasks_that_are_alike_by_chance_do_not_vary_less_than_their_seeds_and_rows():
    tasks = [values - values.mean() + 0.5 for values in normal(3, 3, 8)]
    found = paired.tasks_interval(*tasks)
    variance, _ = spread([(task.mean(axis=1).var(ddof=1) / 27, 2) for task in tasks])
    variance += sum(task.mean(axis=0).var(ddof=1) / 72 for task in tasks)
    half = stats.t.ppf(0.975, 2) * math.sqrt(variance)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half))


def test_one_task_says_nothing_about_others():
    found = paired.tasks_interval(normal(5, 9))
    assert (found.low, found.high, found.method) == (-math.inf, math.inf, "none")


def any_design(rng: np.random.Generator) -> list[np.ndarray]:
    """Tasks whose seeds and rows are few or many, vary much, little or not at all, and may be of no difference."""
    tasks = []
    for _ in range(rng.integers(1, 5)):
        seeds, rows = rng.integers(1, 6), rng.integers(1, 12)
        sizes = rng.choice([0, 0, 1e-9, 0.1, 1, 10], size=4)
        parts = [(1, 1), (seeds, 1), (1, rows), (seeds, rows)]
        values = sum(size * rng.normal(size=shape) for size, shape in zip(sizes, parts, strict=True))
        tasks.append(np.broadcast_to(values, (seeds, rows)))
    return tasks


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_no_interval_is_narrower_than_one_that_allows_for_less(seed, confidence):
    rng, finite = np.random.default_rng(seed), 0
    for _ in range(150):
        tasks = any_design(rng)
        seeds, rows, others = (
            interval(*tasks, confidence=confidence)
            for interval in (paired.seeds_interval, paired.crossed_interval, paired.tasks_interval)
        )
        assert rows.low <= seeds.low <= seeds.high <= rows.high, tasks
        assert others.low <= seeds.low <= seeds.high <= others.high, tasks
        if rows.method != "none":
            assert others.low <= rows.low <= rows.high <= others.high, tasks
            finite += 1
    assert finite > 30


@pytest.mark.parametrize("seeds, tasks, quieter", [(3, 2, 1), (3, 3, 0.5), (2, 3, 1), (4, 2, 0.2)])
@pytest.mark.parametrize("by_rows", [0, 0.5, 2])
def test_intervals_cover_what_they_promise(seeds, tasks, quieter, by_rows):
    """Over seeds the mean on these rows of these tasks, over rows that of these tasks, over tasks that of all tasks;
    whatever tasks differ by, and though all tasks but one have quieter seeds."""
    rng, n, times = np.random.default_rng(seeds), 24, 500
    by_task = rng.normal(size=(times, tasks, 1, 1))
    by_row = by_rows * math.sqrt(n) * rng.normal(size=(times, tasks, 1, n))
    noise = np.array([1.0, *[quieter] * (tasks - 1)])[:, None, None]
    values = by_task + by_row + noise * rng.normal(size=(times, tasks, seeds, 1))
    values = values + rng.normal(size=(times, tasks, seeds, n))
    targets = (by_task + by_row).mean(axis=(1, 2, 3)), by_task.mean(axis=(1, 2, 3)), np.zeros(times)
    for interval, target in zip(
        (paired.seeds_interval, paired.crossed_interval, paired.tasks_interval), targets, strict=True
    ):
        found = [interval(*one) for one in values]
        held = np.mean([i.low <= t <= i.high for i, t in zip(found, target, strict=True)])
        assert held > 0.91, interval.__name__


# standard deviations of the mean by seeds and by rows, and of a single residual
@pytest.mark.parametrize(
    "seeds, by_seeds, by_rows, residual",
    [
        *[(n, *parts) for n in (2, 3, 5) for parts in ((1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 1, 3))],
        (2, 3, 1, 0),
        (3, 3, 1, 0),
        (5, 3, 1, 0),
    ],
)
def test_crossed_interval_covers_what_it_promises(seeds, by_seeds, by_rows, residual):
    rng, rows, times = np.random.default_rng(seeds), 40, 800
    effects = 0.5 + by_seeds * math.sqrt(seeds) * rng.normal(size=(times, seeds, 1))
    effects = effects + by_rows * math.sqrt(rows) * rng.normal(size=(times, 1, rows))
    found = [paired.crossed_interval(one) for one in effects + residual * rng.normal(size=(times, seeds, rows))]
    assert np.mean([i.low <= 0.5 <= i.high for i in found]) > 0.91


def test_an_interval_over_seeds_only_is_too_sure_about_other_test_rows():
    """Why there is a crossed interval at all."""
    rng = np.random.default_rng(0)
    effects = (
        0.5 + 0.3 * rng.normal(size=(200, 12, 1)) + rng.normal(size=(200, 1, 40)) + rng.normal(size=(200, 12, 40))
    )
    found = [intervals.interval(one.mean(axis=1), method="t") for one in effects]
    assert np.mean([i.low <= 0.5 <= i.high for i in found]) < 0.85


# -- paired: tests ----------------------------------------------------------------------------------------------------


def swapped(values: np.ndarray) -> float:
    """Two-sided p over all assignments of signs."""
    signs = np.array(list(itertools.product([1, -1], repeat=len(values))))
    means = np.abs(signs @ values) / len(values)
    return float((means >= abs(values.mean()) - 1e-9).mean())


@pytest.mark.parametrize(
    "values, p",
    [
        ([3, 2, -1], 0.5),  # |4| or more: 6, 4, -4, -6 of eight
        ([1, 1, 0], 0.5),  # swapping a zero changes nothing
        ([0.1, 0.2, -0.3], 1.0),  # the mean is 0, up to rounding
        ([0.7], 1.0),  # nothing to test
        ([0.0] * 5, 1.0),
    ],
)
def test_p_by_hand(values, p):
    assert paired.p_value(values) == pytest.approx(p)
    assert paired.p_value([-v for v in values]) == pytest.approx(p)


@pytest.mark.parametrize("pairs", range(2, 14))
def test_p_is_exact_with_and_without_ties(pairs):
    rng = np.random.default_rng(pairs)
    for values in (rng.normal(0.3, 1, pairs), rng.integers(-2, 4, pairs) / 10):
        assert paired.p_value(values) == pytest.approx(swapped(values))
    assert paired.p_value(np.abs(values) + 0.1) == pytest.approx(2 / 2**pairs)  # one sign throughout


def test_p_is_near_the_exact_one_with_more_pairs():
    values = normal(14) + 0.4
    assert 0.02 < swapped(values) < 0.5
    assert paired.p_value(values) == pytest.approx(swapped(values), rel=0.15)


@pytest.mark.parametrize(
    "raw, holm",
    [
        ([], []),
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 4 x 0.005, 3 x 0.01, 2 x 0.03, never falling
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
    ],
)
def test_holm_by_hand(raw, holm):
    assert paired.corrected(raw) == pytest.approx(holm)


def by_pair(rows: np.ndarray, tasks: int = 2) -> pd.Series:
    """Arrays over test rows, `(pairs, rows)`, by task and seed."""
    seeds = len(rows) // tasks
    index = pd.MultiIndex.from_product([range(tasks), range(seeds)], names=["task", "seed"])
    return pd.Series([*rows], index=index, dtype=object)


@pytest.mark.parametrize(
    "gap, shared, claims",
    [(0.5, 0.1, True), (0.0, 0.1, False), (0.5, 3.0, False)],  # the last is large on these test rows only
)
def test_a_difference_is_clear_when_other_test_rows_would_show_it_too(gap, shared, claims):
    rng = np.random.default_rng(1)
    rows = np.concatenate([gap + shared * rng.normal(size=(1, 20)) + 0.2 * rng.normal(size=(4, 20)) for _ in "tu"])
    found = paired.difference(by_pair(rows))
    assert found.clear() == claims
    assert found.estimate == pytest.approx(rows.mean())
    assert found.permutation == paired.p_value(rows.mean(axis=1))
    assert found.p == max(found.permutation, found.crossed.p)
    assert vars(found.crossed) == pytest.approx(vars(paired.crossed_interval(rows[:4], rows[4:])))


def test_an_answer_that_could_not_be_judged_is_left_out_for_all_seeds():
    rows = normal(6, 9)
    rows[1, 3] = math.nan
    found = paired.difference(by_pair(rows))
    kept = np.delete(rows[:3], 3, axis=1), rows[3:]
    assert vars(found.interval) == pytest.approx(vars(paired.seeds_interval(*kept)))
    assert vars(found.crossed) == pytest.approx(vars(paired.crossed_interval(*kept)))
    assert found.estimate == pytest.approx(found.crossed.estimate)


def test_a_pair_without_a_judged_row_is_left_out_and_nothing_is_no_difference():
    rows = normal(6, 9)
    rows[4] = math.nan
    assert paired.difference(by_pair(rows)).interval.pairs == 5
    nothing = paired.difference(by_pair(rows * math.nan))
    assert (nothing.interval.pairs, nothing.p, nothing.clear()) == (0, 1.0, False)


def test_the_p_of_a_crossed_interval_is_where_it_just_holds_zero():
    rows = normal(4, 12) + 0.4
    p = paired.crossed_interval(rows).p
    assert 0.001 < p < 0.2
    for confidence, excludes in ((1 - p * 1.01, True), (1 - p * 0.99, False)):
        assert paired.crossed_interval(rows, confidence=confidence).excludes_zero == excludes


def test_many_arms_without_a_difference_are_claimed_in_few_tables():
    """Rows that are hard for one arm and easy for another are shared by all seeds: the permutation test over seeds is
    sure of every arm, so the crossed test has to be corrected too."""
    rng, false = np.random.default_rng(0), 0
    for _ in range(60):
        rows = 0.3 * rng.normal(size=(10, 2, 1, 40)) + 0.05 * rng.normal(size=(10, 2, 6, 40))
        arms = paired.together({i: paired.difference(by_pair(np.concatenate([*arm]))) for i, arm in enumerate(rows)})
        false += any(arm.clear() for arm in arms.values())
    assert false <= 7, "5 % of 60 tables, and the rest is luck"


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


def test_two_factors_by_hand():
    # of no factor, a, b and both, for two pairs
    score = dict(zip(coalitions(["a", "b"]), np.array([[0.5, 0.0], [0.6, 1.0], [0.8, 0.0], [1.0, 4.0]]), strict=True))
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
    scores = {c: rng.normal(size=(6, 5)) for c in coalitions(FOUR[:3])}
    scores |= {c | {"site"}: scores[c] for c in coalitions(FOUR[:3])}  # site does nothing
    rows = share_rows({c: by_pair(values) for c, values in scores.items()}, FOUR)
    found = paired.together({factor: paired.difference(values) for factor, values in rows.items()})
    gap = scores[frozenset(FOUR)] - scores[frozenset()]
    assert sum(share.estimate for share in found.values()) == pytest.approx(gap.mean())
    assert found["site"].interval == intervals.Interval(0.0, 0.0, 0.0, 6, "t")
    assert found["site"].crossed == intervals.Interval(0.0, 0.0, 0.0, 6, "crossed") and found["site"].p == 1
    per_pair = shapley(scores.__getitem__, FOUR)
    np.testing.assert_allclose(sum(per_pair.values()), gap)
    by_task = per_pair["form"][:3], per_pair["form"][3:]
    assert vars(found["form"].interval) == pytest.approx(vars(paired.seeds_interval(*by_task)))
    assert vars(found["form"].crossed) == pytest.approx(vars(paired.crossed_interval(*by_task)))
    assert vars(found["form"].tasks) == pytest.approx(vars(paired.tasks_interval(*by_task)))
    raw = [paired.difference(by_pair(per_pair[factor])).p for factor in FOUR]
    assert [share.p for share in found.values()] == pytest.approx(paired.corrected(raw))


# -- curves -----------------------------------------------------------------------------------------------------------


def curve(examples: list[int], scores) -> pd.DataFrame:
    """Scores `(pairs, sizes)` or `(pairs, sizes, rows)`, the pairs being seeds of one task."""
    scores = np.asarray(scores, dtype=float)
    scores = scores.reshape(*scores.shape[:2], -1)
    return pd.DataFrame({n: by_pair(scores[:, i], tasks=1) for i, n in enumerate(examples)})


def test_area_between_points_that_are_apart_unequally():
    # widths 1 and 3 in doublings: ((0.1 + 0.3) / 2 * 1 + (0.3 + 0.7) / 2 * 3) / 4, and the same without the 0.7
    sizes = [4, 8, 64]
    own, baseline = curve(sizes, [[0.5, 0.8, 1.2], [0.5, 0.8, 0.5]]), curve(sizes, [[0.4, 0.5, 0.5]] * 2)
    by_hand = intervals.interval([0.425, 0.1625])
    assert vars(curves.area_between(own, baseline).interval) == pytest.approx(vars(by_hand))


def test_area_of_one_point_and_of_a_constant_gap():
    found = curves.area_between(curve([8], [[0.5], [0.7]]), curve([8], [[0.4], [0.4]]))
    assert found.estimate == pytest.approx(0.2)
    sizes, baseline = [2, 5, 6, 90], normal(3, 4)
    assert curves.area_between(curve(sizes, baseline), curve(sizes, baseline + 0.1)).estimate == pytest.approx(-0.1)


@pytest.mark.parametrize(
    "reached, n", [(-0.1, 0.0), (0.0, 4.0), (0.25, 8.0), (0.5, 16.0), (0.75, 32.0), (1.0, 64.0), (1.1, math.inf)]
)
def test_n_equivalence_by_hand(reached, n):
    # 8 is half the way from 4 to 16, on the log axis
    found = curves.n_equivalence(curve([4, 16, 64], [[0.0, 0.5, 1.0]] * 3), curve([1], [[reached]] * 3)[1])
    assert found.estimate == pytest.approx(n)
    assert (found.low, found.high) == (0, math.inf), "one row a pair says nothing about other rows"
    assert (found.smallest, found.largest) == (4, 64)


@pytest.mark.parametrize("reached, n", [(0.25, math.sqrt(8)), (0.5, 4.0), (0.75, 8 * math.sqrt(2))])
def test_n_equivalence_of_a_baseline_that_falls_once(reached, n):
    # made monotone the baseline is 0, 0.5, 0.5, 1: its plateau is reached where it starts
    baseline = curve([2, 4, 8, 16], [[0.0, 0.6, 0.4, 1.0]] * 2)
    assert curves.n_equivalence(baseline, curve([1], [[reached]] * 2)[1]).estimate == pytest.approx(n)


def test_n_equivalence_with_one_size_only_says_before_or_after():
    noise = 0.01 * normal(4, 1, 9)
    baseline = curve([8], 0.6 + noise)
    for score, text in ((0.4, "<= 8 [<= 8, <= 8]"), (0.8, "> 8 [> 8, > 8]")):
        assert str(curves.n_equivalence(baseline, curve([1], score + noise[::-1])[1])) == text


def test_of_arms_that_learn_alike_the_area_is_nothing_and_n_examples_are_worth_n():
    """Grids of two tasks, three seeds and 32 test rows; rows are hard and training sets good or bad for both arms."""
    rng, held = np.random.default_rng(0), []
    index = pd.MultiIndex.from_product([range(2), range(3)], names=["task", "seed"])
    for _ in range(40):
        hard = {task: rng.normal(0, 0.15, 32) for task in range(2)}
        luck = {pair: rng.normal(0, 0.05) for pair in index}

        def arm(hard=hard, luck=luck) -> pd.DataFrame:
            def rows(pair: tuple[int, int], n: int) -> np.ndarray:
                chance = 0.45 + 0.06 * np.log2(n) + hard[pair[0]] + luck[pair] + rng.normal(0, 0.03)
                return (rng.random(32) < np.clip(chance, 0, 1)).astype(float)

            columns = {n: pd.Series([rows(pair, n) for pair in index], index=index, dtype=object) for n in (4, 16, 64)}
            return pd.DataFrame(columns)

        own, baseline = arm(), arm()
        area, worth = curves.area_between(own, baseline), curves.n_equivalence(baseline, own[16])
        held.append([area.crossed.low <= 0 <= area.crossed.high, worth.low <= 16 <= worth.high])
    of_area, of_worth = np.mean(held, axis=0)
    assert of_area >= 0.93 and of_worth >= 0.93


def test_interval_of_n_equivalence_is_where_the_baseline_cannot_be_told_from_the_arm():
    """The baseline is straight on the log axis and never varies, so its ends are those of the arm's own interval."""
    reached = 0.5 + 0.1 * normal(8, 1, 20)
    baseline = curve([4, 16, 64], np.broadcast_to(np.array([0.0, 0.5, 1.0])[:, None], (8, 3, 20)))
    found = curves.n_equivalence(baseline, curve([1], reached)[1])
    own = paired.crossed_interval(reached[:, 0])
    assert found.estimate == pytest.approx(4 * 16 ** reached.mean())
    assert found.low == pytest.approx(4 * 16**own.low, rel=0.05)
    assert found.high == pytest.approx(4 * 16**own.high, rel=0.05)
    assert found.low < found.estimate < found.high


@pytest.mark.parametrize("few", [3, 8])
def test_interval_of_n_equivalence_covers_what_it_promises(few):
    """Also with three pairs, where percentiles of resampled pairs do not."""
    rng, sizes, truth = np.random.default_rng(few), [4, 16, 64], np.array([0.25, 0.5, 0.75])
    hits = []
    for _ in range(100):
        seeds, rows = 0.1 * rng.normal(size=(few, 4, 1)), 0.3 * rng.normal(size=(1, 4, 30))
        noise = seeds + rows + 0.3 * rng.normal(size=(few, 4, 30))
        found = curves.n_equivalence(curve(sizes, truth[:, None] + noise[:, :3]), curve([1], 0.5 + noise[:, 3:])[1])
        hits.append(found.low <= 16 <= found.high)
    assert np.mean(hits) > 0.9


def test_an_interval_can_be_censored_on_one_side():
    noise = 0.4 * normal(6, 4, 20)
    baseline = curve([4, 16, 64], np.array([0.0, 0.5, 1.0])[:, None] + noise[:, :3])
    high = curves.n_equivalence(baseline, curve([1], 0.97 + noise[:, 3:])[1])
    assert 4 < high.low < high.estimate and high.high == math.inf
    low = curves.n_equivalence(baseline, curve([1], 0.05 + noise[:, 3:])[1])
    assert low.low == 0 and low.high < 64


@pytest.mark.parametrize(
    "ends, text",
    [
        ((11.3137, 0.0, math.inf), "11 [<= 4, > 64]"),
        ((math.inf, 31.7, math.inf), "> 64 [32, > 64]"),
        ((0.0, 0.0, 5.66), "<= 4 [<= 4, 5.7]"),
        ((9.94, 4.0, 10.0), "9.9 [4.0, 10]"),
    ],
)
def test_n_equivalence_as_text(ends, text):
    assert str(curves.Equivalence(*ends, 4, 64)) == text


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
        expected = intervals.interval(by_task)
        assert vars(effect.difference.interval) == pytest.approx(vars(expected), abs=1e-12)
        assert effect.difference.p == 1.0  # half at best with two pairs, and three were looked at


def plain_effects(cells: pd.DataFrame, factors: list[str], measure: str) -> list[tuple]:
    """Row by row: look for the row that differs in this factor only."""
    rows, found, sizes = cells.to_dict("records"), [], cells["examples"].nunique()
    for factor in factors:
        rest = [*[f for f in factors if f != factor], "task", "seed", "examples"]
        levels = [level for level in dict.fromkeys(row[factor] for row in rows) if level != "-"]
        for level in levels[1:]:
            gaps = defaultdict(dict)
            for row, other in itertools.product(rows, rows):
                if row[factor] == level and other[factor] == levels[0] and all(row[c] == other[c] for c in rest):
                    context = tuple(row[f] for f in factors if f != factor)
                    gaps[context].setdefault((row["task"], row["seed"]), []).append(row[measure] - other[measure])
            gaps = {  # means over the numbers of examples, where all are there
                context: whole
                for context, pairs in gaps.items()
                if (whole := {pair: np.mean(both) for pair, both in pairs.items() if len(both) == sizes})
            }
            if gaps:
                kept, pairs = most_whole(gaps)
                means = [float(np.mean([gaps[context][pair] for context in kept])) for pair in pairs]
                by_task = defaultdict(list)  # of one test row
                for (task, _), gap in zip(pairs, means, strict=True):
                    by_task[task].append([gap])
                interval = paired.seeds_interval(*by_task.values())
                found.append((factor, level, levels[0], interval, paired.p_value(means), len(kept)))
    return found


def most_whole(gaps: dict) -> tuple[list, list]:
    """Contexts, those of most pairs first, and the pairs that have all of them: as many as make the most gaps."""
    best, order = ([], []), sorted(sorted(gaps), key=lambda context: -len(gaps[context]))
    for count in range(1, len(order) + 1):
        pairs = sorted(set.intersection(*(set(gaps[context]) for context in order[:count])))
        if count * len(pairs) >= len(best[0]) * len(best[1]):
            best = order[:count], pairs
    return best


def test_an_effect_that_differs_between_contexts_is_not_averaged_over_other_ones_in_other_pairs():
    """+0.3 with 4 examples, none with 16, -0.3 with 64: none, although two pairs lack what was measured with 64."""
    cells = make_cells(planted, {"a": ["x", "y"]}, "tu", range(3), (4, 16, 64), noise=0.0)
    cells["m"] += np.where(cells["a"].eq("y"), cells["examples"].map({4: 0.0, 16: -0.3, 64: -0.6}), 0.0)
    gone = cells["examples"].eq(64) & cells["a"].eq("y") & cells["seed"].eq(2)
    (found,) = factorial.effects(cells[~gone], ["a"], "m")
    assert found.difference.estimate == pytest.approx(0.0, abs=1e-12), "of the four pairs that have all three"
    assert found.difference.interval.pairs == 4
    (change,) = factorial.changes(cells[~gone], ["a"], "m")
    assert (change.difference.estimate, change.difference.interval.pairs) == (pytest.approx(-0.6), 4)


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
    cells = cells.sample(frac=0.98, random_state=0).reset_index(drop=True)
    found = factorial.effects(cells, [*factors], "m")
    expected = plain_effects(cells, [*factors], "m")
    assert [(e.factor, e.level, e.reference, e.contexts) for e in found] == [(*e[:3], e[5]) for e in expected]
    assert {e.factor for e in found} == {"rank", "init"}  # bias has no rank, so no form has a partner
    for ours, plain in zip(found, expected, strict=True):
        assert vars(ours.difference.interval) == pytest.approx(vars(plain[3]), abs=1e-9)
        assert ours.difference.permutation == pytest.approx(plain[4])
    assert min(e.difference.permutation for e in found if e.factor == "init") < 0.05
    assert {e.difference.p for e in found} == {1.0}, "a measure of one row says nothing about others"


def test_effects_of_one_factor_and_of_none():
    cells = make_cells(planted, {"a": ["x", "y"]})
    (found,) = factorial.effects(cells, ["a"], "m")
    assert (found.contexts, found.difference.interval.pairs) == (1, 6)
    assert found.difference.permutation == pytest.approx(2 / 2**6)
    assert factorial.effects(cells[cells["a"] == "x"], ["a"], "m") == []
    assert factorial.effects(cells, [], "m") == []


def test_a_cell_without_the_measure_is_matched_with_nothing():
    cells = make_cells(planted, TWO)
    cells.loc[cells.index[-2:], "m"] = math.nan
    kept = factorial.effects(cells.dropna(), [*TWO], "m")
    assert [e.difference.interval.pairs for e in kept] == [
        5,
        5,
    ]  # the last seed has no y any more, so not both a for an effect of b
    assert factorial.effects(cells, [*TWO], "m") == kept


# -- factorial: analysis of variance ----------------------------------------------------------------------------------


def hc3_f(design: np.ndarray, m: np.ndarray, tested: list[int]) -> float:
    """Wald test of some columns with HC3 errors, in plain linear algebra."""
    inverse = np.linalg.inv(design.T @ design)
    beta = inverse @ design.T @ m
    leverage = np.einsum("ij,jk,ik->i", design, inverse, design)
    weights = ((m - design @ beta) / (1 - leverage)) ** 2
    covariance = inverse @ (design.T * weights) @ design @ inverse
    chosen = covariance[np.ix_(tested, tested)]
    return float(beta[tested] @ np.linalg.solve(chosen, beta[tested]) / len(tested))


@pytest.mark.parametrize("share", [1.0, 0.85], ids=["balanced", "with holes"])
def test_anova_equals_plain_algebra(share):
    cells = make_cells(planted, {"a": ["x", "y"], "b": ["p", "q", "r"]}, "tu", range(3), (4, 8))
    cells["m"] += cells["task"].eq("u") * 0.5 + cells["seed"] * 0.1 - cells["examples"] * 0.02  # the blocks
    cells["m"] += 0.2 * (cells["a"].eq("y") & cells["b"].eq("q"))
    cells = cells.sample(frac=share, random_state=0)
    table = factorial.anova(cells, ["a", "b"], "m")
    means = defaultdict(list)  # over the numbers of examples: nested training sets are no further runs
    for row in cells.itertuples():
        means[row.a, row.b, row.task, row.seed].append(row.m)
    rows = {key: np.mean(both) for key, both in means.items() if len(both) == 2}
    a = np.array([1.0 if key[0] == "x" else -1.0 for key in rows])
    b = np.array([{"p": (1, 0), "q": (0, 1), "r": (-1, -1)}[key[1]] for key in rows])
    blocks = pd.get_dummies([f"{task}/{seed}" for _, _, task, seed in rows])
    design = np.column_stack([a, b, a[:, None] * b, blocks]).astype(float)
    residual, y = len(rows) - 6 - 5, np.array([*rows.values()])
    assert list(table.index) == ["a", "b", "a x b"]
    assert pd.api.types.is_integer_dtype(table["df"])
    for term, tested in (("a", [0]), ("b", [1, 2]), ("a x b", [3, 4])):
        f, df = hc3_f(design, y, tested), len(tested)
        without = np.delete(design, tested, axis=1)
        left, whole = (((y - d @ np.linalg.lstsq(d, y)[0]) ** 2).sum() for d in (without, design))
        expected = {"df": df, "F": f, "p": stats.f.sf(f, df, residual), "share": (left - whole) / left}
        assert table.loc[term].to_dict() == pytest.approx(expected)


def test_anova_finds_a_planted_effect_and_a_planted_interaction_and_nothing_else():
    cells = make_cells(planted, THREE, tasks="tu", seeds=range(3))
    cells["m"] += 0.2 * (cells["b"].eq("q") == cells["c"].eq("s"))
    table = factorial.anova(cells, [*THREE], "m")
    assert list(table.index) == ["a", "b", "c", "a x b", "a x c", "b x c"]
    assert list(table.index[table["p"] < 0.01]) == ["a", "b x c"]
    assert table["share"][["a", "b x c"]].min() > 0.5 > 0.2 > table["share"].drop(["a", "b x c"]).max()


@pytest.mark.parametrize(
    "score, idle",
    [(lambda c: 0.0, ["a", "b", "a x b"]), (lambda c: 0.2 * ((c["a"] == "y") == (c["b"] == "q")), ["a", "b"])],
    ids=["nothing planted", "an interaction planted"],
)
def test_anova_has_false_positives_at_about_the_nominal_rate(score, idle):
    found = [factorial.anova(make_cells(score, TWO, seed=seed), [*TWO], "m").loc[idle, "p"] for seed in range(25)]
    assert 0.005 < (np.array(found) < 0.05).mean() < 0.11


ANALYSES = [factorial.anova, factorial.mixed_model]


@pytest.mark.parametrize("analysis", ANALYSES)
def test_inert_cells_are_left_out(analysis):
    cells = make_cells(planted, TWO)
    inert = make_cells(lambda c: 9.0, {"a": ["x", "y"], "b": ["-"]})
    pd.testing.assert_frame_equal(analysis(pd.concat([cells, inert]), [*TWO], "m"), analysis(cells, [*TWO], "m"))


@pytest.mark.parametrize(
    "analysis, missing",
    [
        (factorial.anova, [0, 5]),
        (factorial.anova, range(4)),  # all of the first seed
        (factorial.mixed_model, [1, 5]),
    ],
)
def test_a_cell_without_the_measure_is_left_out(analysis, missing):
    cells = make_cells(planted, TWO, seeds=range(7))
    cells.loc[list(missing), "m"] = math.nan
    pd.testing.assert_frame_equal(analysis(cells, [*TWO], "m"), analysis(cells.dropna(), [*TWO], "m"))


def test_anova_leaves_three_degrees_of_freedom_to_the_residual():
    cells = make_cells(planted, TWO, seeds=[0, 1])
    # 8 cells, 2 seeds, 2 main effects and their interaction
    assert list(factorial.anova(cells, [*TWO], "m").index) == ["a", "b", "a x b"]
    assert list(factorial.anova(cells[1:], [*TWO], "m").index) == ["a", "b"]
    assert factorial.anova(cells[2:], [*TWO], "m") is None
    assert list(factorial.anova(make_cells(planted, THREE, seeds=[0]), [*THREE], "m").index) == ["a", "b", "c"]


def test_a_factor_that_does_not_vary_has_no_row():
    cells = make_cells(planted, {**TWO, "c": ["r"]})
    assert list(factorial.anova(cells, ["a", "b", "c"], "m").index) == ["a", "b", "a x b"]


@pytest.mark.parametrize(
    "factors",
    [
        {"a": ["x"], "b": ["p"]},  # nothing varies
        {"a": ["x", "-"], "b": ["p", "-"]},  # nothing varies but in inert cells
        {"a": ["-"], "b": ["p", "q"]},  # every cell is inert
    ],
)
@pytest.mark.parametrize("analysis", ANALYSES)
def test_analysis_of_nothing_to_compare_is_none(analysis, factors):
    assert analysis(make_cells(lambda c: 0.0, factors), ["a", "b"], "m") is None


@pytest.mark.parametrize("design", ["half fraction", "one at a time", "a missing combination"])
def test_anova_of_a_design_with_holes_has_main_effects_only_and_finds_the_planted_one(design):
    cells = make_cells(planted, THREE)
    second = sum(cells[f].eq(levels[1]).astype(int) for f, levels in THREE.items())  # of a, b and c
    kept = {
        "half fraction": second % 2 == 0,
        "one at a time": second <= 1,
        "a missing combination": ~(cells["a"].eq("y") & cells["b"].eq("q")),
    }
    table = factorial.anova(cells[kept[design]], [*THREE], "m")
    assert list(table.index) == ["a", "b", "c"]
    assert table.loc["a", "p"] < 1e-4
    assert not (table["p"].drop("a") < 0.005).any()


def test_anova_of_main_effects_that_always_move_together_is_none():
    cells = make_cells(planted, TWO)
    assert factorial.anova(cells[cells["a"].eq("y") == cells["b"].eq("q")], [*TWO], "m") is None


@pytest.mark.parametrize("effect", [0.0, 1.0], ids=["constant", "exactly additive"])
@pytest.mark.parametrize("height", [0.1, 0.3, 0.7, 0.9])
def test_anova_of_rounding_errors_is_none(effect, height):
    cells = make_cells(lambda c: height + effect * height * planted(c), TWO, noise=0.0)
    assert factorial.anova(cells, [*TWO], "m") is None


@pytest.mark.parametrize("name", ["block", "pair", "two words"])
@pytest.mark.parametrize("analysis", ANALYSES)
def test_a_factor_can_have_any_name(analysis, name):
    cells = make_cells(planted, TWO)
    expected = analysis(cells, ["a", "b"], "m")
    found = analysis(cells.rename(columns={"a": name}), [name, "b"], "m")
    pd.testing.assert_frame_equal(found, expected.rename(lambda term: term.replace("a", name)))


# -- factorial: mixed model -------------------------------------------------------------------------------------------


def test_mixed_model_of_a_balanced_grid_equals_the_paired_analysis():
    cells = make_cells(planted, TWO, seeds=range(12), noise=0.1)
    cells["m"] += cells["seed"].map(dict(enumerate(0.3 * normal(12, seed=5))))
    table = factorial.mixed_model(cells, [*TWO], "m")
    assert list(table.index) == ["a: y − x", "b: q − p"]
    for name, factor, (first, second) in (("a: y − x", "a", "xy"), ("b: q − p", "b", "pq")):
        means = cells.groupby(factor)["m"].mean()
        assert table.loc[name, "estimate"] == pytest.approx(means[second] - means[first], abs=1e-6)
        # in a balanced grid REML's residual variance is that of the model with the seeds as blocks
        residual = smf.ols("m ~ C(a) + C(b) + C(seed)", data=cells).fit().mse_resid
        half = 1.959964 * math.sqrt(2 * residual / 24)
        assert table.loc[name, "high"] - table.loc[name, "estimate"] == pytest.approx(half, rel=0.01)
        assert table.loc[name, "estimate"] - table.loc[name, "low"] == pytest.approx(half, rel=0.01)
    assert table.loc["a: y − x", "p"] < 1e-3 < 0.01 < table.loc["b: q − p", "p"]


@pytest.mark.parametrize("tasks, seeds", [("t", range(8)), ("tuv", range(3)), ("tuvwxy", [0])])
def test_mixed_model_recovers_a_planted_effect(tasks, seeds):
    cells = make_cells(planted, TWO, tasks=tasks, seeds=seeds, examples=(4, 16), seed=1)
    cells["m"] += cells["task"].map(dict(zip("tuvwxy", normal(6), strict=True))) + 0.2 * (cells["examples"] == 16)
    table = factorial.mixed_model(cells, [*TWO], "m")
    assert list(table.index) == ["a: y − x", "b: q − p"]  # means over the numbers of examples
    assert table.loc["a: y − x", "low"] < 0.3 < table.loc["a: y − x", "high"]
    assert table.loc["b: q − p", "low"] < 0.0 < table.loc["b: q − p", "high"]
    assert (table["high"] - table["low"] < 0.2).all()


def test_mixed_model_needs_pairs():
    assert factorial.mixed_model(make_cells(planted, TWO, seeds=range(5)), [*TWO], "m") is None
    assert factorial.mixed_model(make_cells(planted, TWO, tasks="tu", seeds=range(2)), [*TWO], "m") is None
    assert factorial.mixed_model(make_cells(planted, TWO, seeds=range(5)), [*TWO], "m", enough=5) is not None
    # ten pairs, but five that are not inert
    cells = pd.concat([make_cells(planted, TWO, seeds=range(5)), make_cells(planted, {"a": ["x"], "b": ["-"]})])
    assert factorial.mixed_model(cells, [*TWO], "m") is None


@pytest.mark.parametrize("level", ["y", "z z"])
def test_mixed_model_compares_with_the_factors_first_level(level):
    factors = {"a": [level, "x"], "b": ["p", "q"]}  # not in the order of the alphabet
    table = factorial.mixed_model(make_cells(lambda c: 0.3 * (c["a"] == level), factors), [*factors], "m")
    assert list(table.index) == [f"a: x − {level}", "b: q − p"]
    assert table.loc[f"a: x − {level}", "estimate"] == pytest.approx(-0.3, abs=0.1)


def test_mixed_model_and_matched_effects_compare_with_the_same_level():
    inert = make_cells(planted, {"a": ["x"], "b": ["-"]})
    cells = pd.concat([inert, make_cells(planted, {"a": ["y", "x"], "b": ["p", "q"]})])
    found = factorial.effects(cells, [*TWO], "m")
    expected = [f"{e.factor}: {e.level} − {e.reference}" for e in found]
    assert list(factorial.mixed_model(cells, [*TWO], "m").index) == expected


# -- designs ----------------------------------------------------------------------------------------------------------


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


def test_an_arm_that_stops_short_keeps_its_last_point():
    points, falls, _ = frontier_of(lambda s: 0.05 * s**2, largest=1.0)
    assert [point.reached for point in points] == [True, False, False] and not falls
    assert all(point.strength == pytest.approx(1.0) and point.kl == pytest.approx(0.05) for point in points[1:])


def test_a_kl_that_jumps_over_a_target_keeps_the_point_below():
    points, _, _ = frontier_of(lambda s: 0.05 * s**2 if s < 1 else 5.0)
    assert [point.reached for point in points] == [True, False, False]
    assert all(0.01 < point.kl < 0.05 for point in points[1:])
