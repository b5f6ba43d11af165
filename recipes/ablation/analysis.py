"""How the arms of a grid compare: differences from a baseline, curves over numbers of examples, Shapley shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from steertune.recipes.ablation import designs
from steertune.recipes.ablation.levels import arm_name
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.statistics.curves import Equivalence, area_between, n_equivalence
from steertune.recipes.ablation.statistics.paired import Difference, difference, together
from steertune.recipes.ablation.statistics.rows import over_examples, rows_of
from steertune.recipes.ablation.statistics.shapley import share_rows
from steertune.recipes.ablation.tables import GridTables, TaskTable


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline on one measure; positive is better than the baseline.

    Attributes:
        mean: Mean of the arm.
        difference: Arm minus baseline over pairs of task and seed; p is corrected (Holm) over all arms of the table.
    """

    arm: str
    mean: float
    difference: Difference


@dataclass(frozen=True)
class Attribution:
    """How much each factor contributes to the gap between the two ends of the design.

    Attributes:
        shares: Factor -> its Shapley share; empty if they cannot be computed.
        leads: If the claim names a factor: other factor -> how much larger the share of the named factor is.
        why: Why there are no shares.
    """

    shares: dict[str, Difference] = field(default_factory=dict)
    leads: dict[str, Difference] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class Efficiency:
    """An arm's curve against the baseline's.

    Attributes:
        area: Mean height over the baseline's curve on the log axis.
        equivalents: Number of examples of the arm -> how many the baseline needs for the same score.
    """

    arm: str
    area: Difference
    equivalents: dict[int, Equivalence]


def scores(cells: Frame, measure: str) -> Frame:
    """Means over the numbers of examples, by (task, seed) and arm, as arrays over the test rows. An arm has no value
    in a pair where it was not run with every number."""
    wide = over_examples(cells, measure, ["task", "seed", "arm"]).unstack("arm")
    return wide[[arm for arm in dict.fromkeys(cells["arm"]) if arm in wide]]


def mean(values: Frame) -> float:
    """Mean over the arrays of their means, without NaN."""
    return float(np.mean([np.nanmean(rows) for rows in values if np.isfinite(rows).any()]))


def in_pairs(cells: Frame, tasks: Sequence[str | TaskTable]) -> Frame:
    """Merge tasks that are made of the same rows into one task with the seeds of all of them. Then `task` and `seed`
    say what is paired and what is crossed, and the effect of a test row is counted once."""
    tables = [task if isinstance(task, TaskTable) else TaskTable(name=task) for task in tasks]
    names = {task.called: task.name for task in tables}
    shared = {label: name for label, name in names.items() if [*names.values()].count(name) > 1}
    if not shared:
        return cells
    pairs = zip(cells["task"], cells["seed"], strict=True)
    seeds = [f"{task} {seed}" if task in shared else seed for task, seed in pairs]
    return cells.assign(task=cells["task"].replace(shared), seed=pd.Series(seeds, index=cells.index, dtype=object))


def gap(both: Frame, arm: str, than: str, sample: bool = False) -> Difference:
    """The difference between two arms over the pairs of `scores` that have both; with `sample`, tasks are treated as a
    sample."""
    return difference(both[arm] - both[than], sample)


def comparisons(cells: Frame, than: str, measure: str, sample: bool = False) -> list[Comparison]:
    """Compare every arm with `than`, paired by task and seed; with `sample`, tasks are treated as a sample."""
    wide = scores(cells, measure)
    pairs = {arm: wide[[arm, than]].dropna() for arm in wide if arm != than and than in wide}
    pairs = {arm: both for arm, both in pairs.items() if len(both)}
    gaps = together({arm: gap(both, arm, than, sample) for arm, both in pairs.items()})
    return [Comparison(arm, mean(pairs[arm][arm]), one) for arm, one in gaps.items()]


def by_examples(
    cells: Frame, than: str, measure: str, sample: bool = False
) -> dict[str, dict[int, tuple[float, Difference | None]]]:
    """Arm -> number of examples -> the arm's mean and its difference from `than` at that number (None for `than`
    itself, or if no pair has both arms); p is corrected (Holm) over the whole table."""
    means: dict[tuple[str, int], float] = {}
    gaps: dict[tuple[str, int], Difference] = {}
    for n in sorted(int(n) for n in cells["examples"].unique()):
        wide = scores(cells[cells["examples"] == n], measure)
        for arm in (arm for arm in wide if wide[arm].notna().any()):
            means[arm, n] = mean(wide[arm].dropna())
            both = wide[[arm, than]].dropna() if than in wide and arm != than else wide[:0]
            if len(both):
                gaps[arm, n] = gap(both, arm, than, sample)
    tests = together(gaps)
    table: dict[str, dict[int, tuple[float, Difference | None]]] = {}
    for (arm, n), value in means.items():
        table.setdefault(arm, {})[n] = value, tests.get((arm, n))
    return table


def efficiency(cells: Frame, than: str, measure: str, sample: bool = False) -> list[Efficiency]:
    """Compare the curves over the numbers of examples, in the pairs that were run with every number."""
    examples = sorted(int(n) for n in cells["examples"].unique())
    values = rows_of(cells, measure).set_axis(pd.MultiIndex.from_frame(cells[["task", "seed", "arm", "examples"]]))
    wide = values.dropna().unstack(["arm", "examples"])
    results = {}
    for arm in (a for a in dict.fromkeys(cells["arm"]) if a != than):
        columns = [(a, n) for a in (arm, than) for n in examples]
        if any(column not in wide.columns for column in columns):
            continue
        both = wide[columns].dropna()
        if both.empty:
            continue
        curve, baseline = both[arm][examples], both[than][examples]
        equivalents = {n: n_equivalence(baseline, curve[n]) for n in examples}
        results[arm] = Efficiency(arm, area_between(curve, baseline, sample), equivalents)
    areas = together({arm: one.area for arm, one in results.items()})
    return [replace(one, area=areas[arm]) for arm, one in results.items()]


def attribution(
    cells: Frame,
    tables: GridTables,
    measure: str,
    factor: str | None = None,
    labels: Mapping[str, str] | None = None,
    sample: bool = False,
) -> Attribution:
    """Shapley share of every factor that differs between `design.start` and `design.end` in the gap between them, over
    the pairs that have every mixture of the two. Cells can name arms by their `labels`; with `sample`, tasks are
    treated as a sample."""
    start, end = tables.design.start, tables.design.end
    if not start or not end:
        return Attribution(why="that takes every mixture of a `design.start` and a `design.end`")
    moving = [f for f in tables.factors if start[f] != end[f]]
    wide = scores(cells, measure)
    names = {
        frozenset(f for f in moving if mixture[f] == end[f]): (labels or {}).get(
            name := arm_name(tables, mixture), name
        )
        for mixture in designs.mixtures({f: list(levels) for f, levels in tables.factors.items()}, start, end)
    }
    complete = wide.reindex(columns=sorted(set(names.values()))).dropna()
    if complete.empty:
        short = [name for name in names.values() if name not in wide or wide[name].isna().any()]
        return Attribution(why=f"no pair of task and seed has every mixture; {', '.join(short)} lack some or all")
    rows = share_rows({coalition: complete[name] for coalition, name in names.items()}, moving)
    leads = {f: difference(rows[factor] - rows[f], sample) for f in moving if f != factor} if factor in moving else {}
    return Attribution(together({f: difference(values, sample) for f, values in rows.items()}), together(leads))
