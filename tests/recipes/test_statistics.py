"""Differences between arms, Shapley shares and learning curves: values by hand, slow plain references, other
libraries, and small simulations."""

from __future__ import annotations

import gc
import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from steertune.recipes.ablation.statistics import curves, paired
from steertune.recipes.ablation.statistics.shapley import shapley, share_rows
from steertune.recipes.lab import intervals

gc.freeze()  # Holm's correction in statsmodels collects garbage on every call: spare it what torch keeps alive

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


def test_one_seed_does_not_say_how_much_seeds_vary():
    alone = [[[0.2, 0.3]], [[0.4, 0.2]], [[0.9, 0.5]]]
    for interval in (paired.seeds_interval, paired.crossed_interval):
        found = interval(*alone)
        assert found.method == "none" and not np.isfinite([found.low, found.high]).any()
        assert found.estimate == pytest.approx(np.mean(alone))
    assert np.isfinite(paired.tasks_interval(*alone).low)


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
        if seeds.method != "none":
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


@pytest.mark.slow
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


@pytest.mark.slow
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
