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
from steertune.recipes.ablation.statistics.rows import mean_rows, rows_of

INERT = "-"
_RESIDUAL = 3  # degrees of freedom that an analysis of variance must leave
_BLOCK = "steertune_block"  # a column of our own, which no factor is called


@dataclass(frozen=True)
class Effect:
    """What changing one factor does, everything else equal.

    Attributes:
        factor: Name of the factor.
        level: The level.
        reference: The level it is compared with.
        difference: One array of test rows per pair of task and seed, averaged over the matched contexts; p is
            corrected (Holm) over all effects that were looked at together.
        contexts: In how many settings of the other factors both levels were run.
    """

    factor: str
    level: str
    reference: str
    difference: Difference
    contexts: int


def effects(cells: Frame, factors: Sequence[str], measure: str) -> list[Effect]:
    """Every level of every factor against the factor's first level, within matched contexts.

    Levels that mean nothing in a context (`-`) are compared nowhere.

    Args:
        cells: One row a cell: a column per factor, `task`, `seed`, `examples`, and the measure.
        factors: The factors; the order of their first appearance in the rows is the order of the levels.
        measure: Column to compare.
    """
    found = []
    index = [*factors, "task", "seed", "examples"]
    values = rows_of(cells, measure).set_axis(pd.MultiIndex.from_frame(cells[index])).dropna()
    for factor in factors:
        others = [f for f in factors if f != factor]
        levels = [level for level in dict.fromkeys(cells[factor]) if level != INERT]
        wide = values.unstack(factor)
        for level in levels[1:]:
            if level not in wide or levels[0] not in wide:
                continue
            both = wide[[levels[0], level]].dropna()
            if both.empty:
                continue
            gap = both[level] - both[levels[0]]
            contexts = len(gap.groupby(level=others)) if others else 1
            pairs = mean_rows(gap, ["task", "seed"])
            found.append(Effect(factor, level, levels[0], difference(pairs), contexts))
    tests = together({i: effect.difference for i, effect in enumerate(found)})
    return [replace(effect, difference=tests[i]) for i, effect in enumerate(found)]


def anova(cells: Frame, factors: Sequence[str], measure: str) -> Frame | None:
    """Main effects and two-way interactions, with errors that are robust to unequal variances (HC3); tasks and seeds
    are blocks, and an effect is taken to be the same in every one. Cells with a level that means nothing are left out,
    and interactions that the runs cannot tell apart. None if nothing is left to compare.

    Returns:
        One row a term: `df`, `F`, `p`, and `share`, the term's share of the variance that it explains together with
        the residual (partial eta squared, of the plain analysis).
    """
    rows, varied = _crossed(cells, factors, measure)
    if not varied:
        return None
    rows = rows.assign(**{_BLOCK: rows["task"].astype(str) + "/" + rows["seed"].astype(str) + _size(rows)})
    terms = [f"C(Q('{f}'), Sum)" for f in varied]
    chosen = [*terms, *(f"{a}:{b}" for a, b in combinations(terms, 2))]
    model = _told_apart(rows, measure, chosen) or _told_apart(rows, measure, chosen := terms)
    if model is None:
        return None
    fitted = model.fit()
    if fitted.ssr <= 1e-10 * (rows[measure] ** 2).sum():  # nothing but rounding is left to compare with
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
    design that cannot tell the factors apart. An effect is taken to be the same in every pair.

    Returns:
        One row a level against its factor's first to appear: `estimate`, `low`, `high`, `p`.
    """
    rows, varied = _crossed(cells, factors, measure)
    if not varied or len(rows[["task", "seed"]].drop_duplicates()) < enough:
        return None
    size = " + C(examples)" if rows["examples"].nunique() > 1 else ""
    terms = [f"C(Q('{f}'), Treatment({_first(cells[f], rows[f])!r}))" for f in varied]
    formula = f"Q('{measure}') ~ {' + '.join(terms)}{size}"
    design: Any = smf.ols(formula, data=rows).exog
    if np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    several = rows["task"].nunique() > 1
    options: dict[str, Any] = (
        {"groups": "task", "re_formula": "1", "vc_formula": {"seed": "0 + C(seed)"}} if several else {"groups": "seed"}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        fitted = smf.mixedlm(formula, data=rows, **options).fit()
    ends = fitted.conf_int()
    kept = [name for name in fitted.params.index if name.startswith("C(Q(")]
    names = [re.sub(r"C\(Q\('(.*)'\), Treatment\('(.*)'\)\)\[T\.(.*)\]", r"\1: \3 − \2", name) for name in kept]
    found = pd.DataFrame(
        {
            "estimate": fitted.params[kept].to_numpy(),
            "low": ends.loc[kept, 0].to_numpy(),
            "high": ends.loc[kept, 1].to_numpy(),
            "p": fitted.pvalues[kept].to_numpy(),
        },
        index=pd.Index(names, name="level"),
    )
    return None if found.isna().any(axis=None) else found


def _crossed(cells: Frame, factors: Sequence[str], measure: str) -> tuple[Frame, list[str]]:
    """Cells with the measure and without inert levels, and the factors that still vary there."""
    rows = cells[~(cells[list(factors)] == INERT).any(axis=1)].dropna(subset=[*factors, measure])
    return rows, [f for f in factors if rows[f].nunique() > 1]


def _first(everywhere: Frame, here: Frame) -> str:
    """The level that all tables of a report count from: the first to appear anywhere that is also here."""
    return next(level for level in dict.fromkeys(everywhere) if level in set(here))


def _size(rows: Frame) -> Frame:
    return "/" + rows["examples"].astype(str) if rows["examples"].nunique() > 1 else ""
