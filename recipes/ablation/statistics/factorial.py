"""Effects of the factors of a grid: matched comparisons, analysis of variance, mixed model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.formula.api as smf
from statsmodels.stats.anova import anova_lm
from statsmodels.tools.sm_exceptions import ConvergenceWarning

from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.statistics.paired import Difference, difference, together
from steertune.recipes.ablation.statistics.rows import mean_rows, over_examples

INERT = "-"
_RESIDUAL = 3  # degrees of freedom that an analysis of variance must leave
_BLOCK = "steertune_block"  # a column that is added here; no factor has this name


@dataclass(frozen=True)
class Effect:
    """The effect of changing one factor, everything else equal.

    Attributes:
        reference: The level it is compared with.
        difference: Over pairs of task and seed, of means over numbers of examples and matched contexts; p is
            corrected (Holm) over all effects that were looked at together.
        contexts: In how many settings of the other factors both levels were run.
    """

    factor: str
    level: str
    reference: str
    difference: Difference
    contexts: int


def effects(cells: Frame, factors: Sequence[str], measure: str, sample: bool = False) -> list[Effect]:
    """Every level of every factor against the factor's first level, within matched contexts. A row of `cells` is a
    cell, with a column per factor, `task`, `seed`, `examples` and the measure.

    Levels that mean nothing in a context (`-`) are not compared.
    """
    if not factors:
        return []
    return _effects(over_examples(cells, measure, [*factors, "task", "seed"]), cells, factors, sample)


def changes(cells: Frame, factors: Sequence[str], measure: str, sample: bool = False) -> list[Effect]:
    """How much larger every effect is with the most examples than with the fewest, which is the interaction of the
    factor with the number of examples."""
    ends = [cells[cells["examples"] == n] for n in (cells["examples"].max(), cells["examples"].min())]
    most, fewest = (over_examples(end, measure, [*factors, "task", "seed"]) for end in ends)
    both = most.index.intersection(fewest.index)
    return _effects(most[both] - fewest[both], cells, factors, sample)


def _effects(values: Frame, cells: Frame, factors: Sequence[str], sample: bool) -> list[Effect]:
    """Effects in arrays by factors, task and seed; levels are ordered as in the cells."""
    effects_ = []
    for factor in factors if len(values) else ():
        levels = [level for level in dict.fromkeys(cells[factor]) if level != INERT]
        wide = values.unstack(factor)
        for level in levels[1:]:
            if level not in wide or levels[0] not in wide:
                continue
            both = wide[[levels[0], level]].dropna()
            if both.empty:
                continue
            gap, others = both[level] - both[levels[0]], [f for f in factors if f != factor]
            gap = balanced(gap) if others else gap
            contexts = len(gap.groupby(level=others)) if others else 1
            over = difference(mean_rows(gap, ["task", "seed"]), sample)
            effects_.append(Effect(factor, level, levels[0], over, contexts))
    tests = together({i: effect.difference for i, effect in enumerate(effects_)})
    return [replace(effect, difference=tests[i]) for i, effect in enumerate(effects_)]


def balanced(gap: Frame) -> Frame:
    """Keep the differences (by task, seed and context) of pairs that all have the same contexts, so that every pair is
    averaged over the same ones. Contexts are added in the order of how many pairs have them, up to the number that
    keeps the most differences."""
    wide = gap.unstack(["task", "seed"])
    has_pair = wide.notna().to_numpy()
    order = np.argsort(-has_pair.sum(axis=1), kind="stable")
    have_all = np.logical_and.accumulate(has_pair[order], axis=0)
    counts = np.arange(1, len(order) + 1) * have_all.sum(axis=1)
    count = int(np.flatnonzero(counts == counts.max())[-1]) + 1
    return wide.iloc[np.sort(order[:count])].loc[:, have_all[count - 1]].stack(["task", "seed"], future_stack=True)


def anova(cells: Frame, factors: Sequence[str], measure: str) -> Frame | None:
    """Main effects and two-way interactions, with errors that are robust to unequal variances (HC3); tasks and seeds
    are blocks, and an effect is assumed to be the same in every one. Cells with a level that means nothing are left
    out, as are interactions that the runs cannot tell apart. None if nothing is left to compare.

    Returns:
        One row per term: `df`, `F`, `p`, and `share`, the term's share of the variance that it explains together with
        the residual (partial eta squared, of the plain analysis).
    """
    rows, varied = _crossed(cells, factors, measure)
    if not varied:
        return None
    rows = rows.assign(**{_BLOCK: rows["task"].astype(str) + "/" + rows["seed"].astype(str)})
    terms = [f"C(Q('{f}'), Sum)" for f in varied]
    chosen = [*terms, *(f"{a}:{b}" for a, b in combinations(terms, 2))]
    model = _told_apart(rows, measure, chosen) or _told_apart(rows, measure, chosen := terms)
    if model is None:
        return None
    fitted = model.fit()
    if fitted.ssr <= 1e-10 * (rows[measure] ** 2).sum():  # only rounding is left as residual
        return None
    # type III: with robust errors, statsmodels' type II lets an interaction leak into its main effects
    robust, plain = (anova_lm(fitted, typ=3, robust=kind).loc[chosen] for kind in ("hc3", None))
    names = [name.replace("C(Q('", "").replace("'), Sum)", "").replace(":", " x ") for name in chosen]
    return pd.DataFrame(
        {
            "df": plain["df"].astype(int).to_numpy(),
            "F": robust["F"].to_numpy(),
            "p": robust["PR(>F)"].to_numpy(),
            "share": (plain["sum_sq"] / (plain["sum_sq"] + fitted.ssr)).to_numpy(),
        },
        index=pd.Index(names, name="term"),
    )


def _told_apart(rows: Frame, measure: str, terms: Sequence[str]) -> Any:
    """The linear model of these terms and blocks; None for a design that cannot tell them apart."""
    blocks = [f"C({_BLOCK}, Sum)"] if rows[_BLOCK].nunique() > 1 else []
    model = smf.ols(f"Q('{measure}') ~ {' + '.join([*terms, *blocks])}", data=rows)
    design: Any = model.exog
    return model if np.linalg.matrix_rank(design) == design.shape[1] <= len(rows) - _RESIDUAL else None


def mixed_model(cells: Frame, factors: Sequence[str], measure: str, enough: int = 6) -> Frame | None:
    """Main effects with task and seed as random effects; None with fewer than `enough` pairs of task and seed, or a
    design that cannot tell the factors apart. An effect is assumed to be the same in every pair.

    Returns:
        One row per level, against the first level of its factor to appear: `estimate`, `low`, `high`, `p`.
    """
    rows, varied = _crossed(cells, factors, measure)
    if not varied or len(rows[["task", "seed"]].drop_duplicates()) < enough:
        return None
    # the reference level of all tables of a report: the first to appear anywhere that also appears here
    references = {f: next(level for level in dict.fromkeys(cells[f]) if level in set(rows[f])) for f in varied}
    terms = [f"C(Q('{f}'), Treatment({level!r}))" for f, level in references.items()]
    formula = f"Q('{measure}') ~ {' + '.join(terms)}"
    design: Any = smf.ols(formula, data=rows).exog
    if np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    options: dict[str, Any] = {"groups": "task" if rows["task"].nunique() > 1 else "seed"}
    if options["groups"] == "task" and rows["seed"].nunique() > 1:  # one seed shows no variation within a task
        options |= {"re_formula": "1", "vc_formula": {"seed": "0 + C(seed)"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        fitted = smf.mixedlm(formula, data=rows, **options).fit()
    ends = fitted.conf_int()
    levels = [name for name in fitted.params.index if name.startswith("C(Q(")]
    names = [re.sub(r"C\(Q\('(.*)'\), Treatment\('(.*)'\)\)\[T\.(.*)\]", r"\1: \3 − \2", name) for name in levels]
    table = pd.DataFrame(
        {
            "estimate": fitted.params[levels].to_numpy(),
            "low": ends.loc[levels, 0].to_numpy(),
            "high": ends.loc[levels, 1].to_numpy(),
            "p": fitted.pvalues[levels].to_numpy(),
        },
        index=pd.Index(names, name="level"),
    )
    return None if table.isna().any(axis=None) else table


def _crossed(cells: Frame, factors: Sequence[str], measure: str) -> tuple[Frame, list[str]]:
    """Means over the numbers of examples (whose training sets are nested, so that they are not separate runs) of arms
    that have all of them, without inert levels; and the factors that still vary there."""
    rows = cells[~(cells[list(factors)] == INERT).any(axis=1)].dropna(subset=[*factors, measure])
    groups = rows.groupby([*factors, "task", "seed"], sort=False)[measure]
    means = groups.mean()[groups.size() == cells["examples"].nunique()].reset_index()
    return means, [f for f in factors if means[f].nunique() > 1]
