"""Effects of factors, analysis of variance and mixed models of a grid: values by hand, slow plain references, other
libraries, and small simulations."""

from __future__ import annotations

import gc
import itertools
import math
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from scipy import stats

from steertune.recipes.ablation import designs
from steertune.recipes.ablation.statistics import factorial, paired
from steertune.recipes.lab import intervals

gc.freeze()  # Holm's correction in statsmodels collects garbage on every call: spare it what torch keeps alive

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
        found, expected = effect.difference.tasks, intervals.interval(by_task)
        ends = (found.estimate, found.low, found.high)
        assert ends == pytest.approx((expected.estimate, expected.low, expected.high), abs=1e-12)
        assert effect.difference.interval.method == "none"  # of one seed
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
    cells["m"] += cells["seed"].map(dict(enumerate(0.3 * np.random.default_rng(5).normal(size=12))))
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
    cells["m"] += cells["task"].map(
        dict(zip("tuvwxy", np.random.default_rng(0).normal(size=6), strict=True))
    ) + 0.2 * (cells["examples"] == 16)
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
