"""The analysis of a grid: comparisons with the baseline, the verdict on the claim, attribution, sample efficiency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from steertune.recipes.ablation import designs
from steertune.recipes.ablation.levels import arm_name
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.statistics.curves import Equivalence, area_between, n_equivalence
from steertune.recipes.ablation.statistics.paired import Difference, difference, least_p, smallest_p, together
from steertune.recipes.ablation.statistics.rows import over_examples, rows_of, with_base
from steertune.recipes.ablation.statistics.shapley import share_rows
from steertune.recipes.ablation.strengths import short, unfit
from steertune.recipes.ablation.tables import Claim, GridTables, TaskTable
from steertune.recipes.lab.files import ArmError

_LEFT_OUT = 0.1  # share of the pairs
BASE = "the base model"


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline on one measure; positive is better than the baseline.

    Attributes:
        arm: The arm.
        mean: The arm's own mean.
        difference: Over pairs of task and seed; p is corrected (Holm) over all arms of the table.
    """

    arm: str
    mean: float
    difference: Difference


@dataclass(frozen=True)
class Verdict:
    """Whether the result counts for the claim, and why, in a sentence."""

    side: Literal["for", "against", "undecided"]
    sentence: str


@dataclass(frozen=True)
class Attribution:
    """Which factors the gap between the two ends of the design comes from.

    Attributes:
        shares: Factor -> its Shapley share; empty if they cannot be computed.
        leads: With a factor that the claim names: other factor -> how much larger the named one's share is.
        why: Why there are no shares.
    """

    shares: dict[str, Difference] = field(default_factory=dict)
    leads: dict[str, Difference] = field(default_factory=dict)
    why: str = ""


def scores(cells: Frame, measure: str) -> Frame:
    """Means over the numbers of examples, by (task, seed) and arm, as arrays over the test rows. An arm that lacks one
    of the numbers in a pair has no value there."""
    wide = over_examples(cells, measure, ["task", "seed", "arm"]).unstack("arm")
    return wide[[arm for arm in dict.fromkeys(cells["arm"]) if arm in wide]]


def mean(values: Frame) -> float:
    """Mean of arrays."""
    return float(np.mean([np.nanmean(rows) for rows in values if np.isfinite(rows).any()]))


def in_pairs(cells: Frame, tasks: Sequence[str | TaskTable]) -> Frame:
    """The cells, with tasks that are made of the same rows merged into one task that has the seeds of each. So `task`
    and `seed` say what is paired and what is crossed, and the effect of a test row is counted once."""
    tables = [task if isinstance(task, TaskTable) else TaskTable(name=task) for task in tasks]
    names = {task.called: task.name for task in tables}
    shared = {label: name for label, name in names.items() if [*names.values()].count(name) > 1}
    if not shared:
        return cells
    pairs = zip(cells["task"], cells["seed"], strict=True)
    seeds = [f"{task} {seed}" if task in shared else seed for task, seed in pairs]
    return cells.assign(task=cells["task"].replace(shared), seed=pd.Series(seeds, index=cells.index, dtype=object))


def gap(both: Frame, arm: str, than: str, sample: bool = False) -> Difference:
    """The difference of two arms in the pairs of `scores` that have both; with `sample`, tasks are a sample."""
    return difference(both[arm] - both[than], sample)


def comparisons(cells: Frame, than: str, measure: str, sample: bool = False) -> list[Comparison]:
    """Every arm against `than`, paired by task and seed; with `sample`, tasks are a sample."""
    wide = scores(cells, measure)
    pairs = {arm: wide[[arm, than]].dropna() for arm in wide if arm != than and than in wide}
    pairs = {arm: both for arm, both in pairs.items() if len(both)}
    gaps = together({arm: gap(both, arm, than, sample) for arm, both in pairs.items()})
    return [Comparison(arm, mean(pairs[arm][arm]), one) for arm, one in gaps.items()]


def verdict(
    cells: Frame,
    claim: Claim,
    attributed: Attribution = Attribution(),
    planned: int = 0,
    targets: Sequence[float] = (),
) -> Verdict:
    """Decide the claim: for it if `better` is clearly more than `margin` ahead and the share of the factor that it
    names, if any, is clearly the largest; against it if one of the two clearly fails; else undecided.

    Args:
        cells: All cells, including those that failed.
        claim: The claim.
        attributed: `attribution` for the claim's measure.
        planned: How many pairs of task and seed the grid has, run or not; 0: those of the cells.
        targets: The KLs to the base that the claim is about.
    """
    if claim.recovers is not None:
        cells = with_base(cells, BASE)
    wide = scores(cells, claim.column)
    missing = [arm for arm in (claim.better, claim.than) if arm not in wide or wide[arm].isna().all()]
    if missing:
        return Verdict("undecided", f"{missing} have no {claim.label}, so the claim cannot be decided.")
    both = wide.dropna(subset=[claim.better, claim.than])
    rows = _ahead(both, claim.better, claim)
    plain, over = difference(rows, claim.sample), difference(rows - claim.margin, claim.sample)
    if not plain.interval.pairs:
        return Verdict("undecided", "No pair of task and seed has both arms of the claim yet.")
    pairs, all_pairs = plain.interval.pairs, planned or len(cells[["task", "seed"]].drop_duplicates())
    left_out = _left_out(cells, claim, all_pairs - pairs)
    what = (
        f"{claim.better} has {mean(both[claim.better]):.3f} {claim.label}, {claim.than} has "
        f"{mean(both[claim.than]):.3f}: {_compared(both, claim)} {plain} ({_reach(plain)}, "
        f"given the settings chosen; {pairs} of {all_pairs} pairs of task and seed{left_out}; "
        f"p = {over.p:.3g}{f' that it is not {claim.margin:g}' if claim.margin else ''})"
    )
    ahead_arm, behind_arm = (claim.better, claim.than)[:: 1 if over.estimate > 0 else -1]
    if short(cells[cells["arm"] == behind_arm], targets):  # so the two are not at the same KL
        what = f"{what}; {behind_arm} stops short of KL {max(targets):g} in some cells and counts with its last point"
    if all_pairs - pairs > _LEFT_OUT * all_pairs:
        return Verdict(
            "undecided", f"{what}; with more than {_LEFT_OUT:.0%} of the pairs left out nothing is decided."
        )
    gain = None if claim.recovers is None else difference(both[claim.than] - both[BASE], claim.sample)
    if gain is not None and not (gain.clear(claim.alpha) and gain.estimate > 0):
        return Verdict(
            "undecided",
            f"{what}; but {claim.than} has no clear gain over the base ({gain}), of which that were a share.",
        )
    if not over.clear(claim.alpha):
        least = 0.0 if claim.sample else smallest_p(pairs)
        why = f"; {pairs} pairs cannot give a p below {least:.2g}" if least >= claim.alpha else ""
        return Verdict("undecided", f"{what}, which is neither clearly more nor clearly less than claimed{why}.")
    if why := unfit(cells, ahead_arm, claim.strength, targets):
        return Verdict("undecided", f"{what}; but {why}, and wins no claim.")
    if over.estimate < 0:
        less = f"below the smallest difference that would matter ({claim.margin:g})" if claim.margin else "less"
        return Verdict("against", f"{what}, {less}.")
    side, clause = _largest_share(claim, attributed)
    return Verdict(side, f"{what}, more{f' than {claim.margin:g}' if claim.margin else ''}{clause}.")


def _reach(difference: Difference) -> str:
    """What the interval of a claim allows for."""
    if difference.sample:
        return f"95 %, for other tasks like these; within these tasks {difference.crossed.ends}"
    return "95 %, for other seeds and test rows of these tasks"


def _ahead(wide: Frame, arm: str, claim: Claim) -> Frame:
    """How far an arm is ahead of `than`, or of the claimed share of `than`'s gain over the base model."""
    if claim.recovers is None:
        return wide[arm] - wide[claim.than]
    return wide[arm] - wide[BASE] - claim.recovers * (wide[claim.than] - wide[BASE])


def ahead(cells: Frame, claim: Claim) -> Difference:
    """How far `better` is ahead of what the claim compares it with, over the pairs that have both."""
    wide = scores(with_base(cells, BASE), claim.column)
    return difference(_ahead(wide.dropna(subset=[claim.better, claim.than]), claim.better, claim), claim.sample)


@dataclass(frozen=True)
class TaskResult:
    """The claim's comparison in one task.

    Attributes:
        name: The task.
        base: Mean of the base model.
        than: Mean of the arm that is compared with.
        better: Mean of the arm that is claimed to be better.
        ahead: How far it is ahead; p is not corrected.
    """

    name: str
    base: float
    than: float
    better: float
    ahead: Difference


def by_task(cells: Frame, claim: Claim) -> list[TaskResult]:
    """The claim's comparison in every task that has a pair with both arms."""
    wide = scores(with_base(cells, BASE), claim.column)
    if not {claim.better, claim.than} <= {*wide}:
        return []
    both = wide.dropna(subset=[claim.better, claim.than])
    results = []
    for task, rows in both.groupby(level="task"):
        base, than, better = (mean(rows[arm].dropna()) for arm in (BASE, claim.than, claim.better))
        results.append(TaskResult(str(task), base, than, better, difference(_ahead(rows, claim.better, claim))))
    return results


def _compared(both: Frame, claim: Claim) -> str:
    if claim.recovers is None:
        return "a difference of"
    base, own, other = (mean(both[arm]) for arm in (BASE, claim.better, claim.than))
    share = f"{(own - base) / (other - base):.2f}" if other > base else "no share"
    return f"{share} of its gain over the base's {base:.3f}, and more than {claim.recovers:g} of it by"


@dataclass(frozen=True)
class Recovered:
    """How much of another arm's gain over the base model an arm reaches.

    Attributes:
        arm: The arm.
        gain: Over the base model.
        share: Its mean gain over that of the claim's `than`; None where that gains nothing.
        ahead: Its gain minus the claimed share of the other's; p is corrected (Holm) over all arms of the table.
    """

    arm: str
    gain: Difference
    share: float | None
    ahead: Difference


def recovered(cells: Frame, claim: Claim) -> list[Recovered]:
    """The share of the claimed gain that every arm reaches, for a claim with `recovers`."""
    wide = scores(with_base(cells, BASE), claim.column)
    pairs = {arm: wide[list({arm, claim.than, BASE})].dropna() for arm in wide if arm != BASE and claim.than in wide}
    pairs = {arm: rows for arm, rows in pairs.items() if len(rows)}
    ahead = {arm: difference(_ahead(rows, arm, claim), claim.sample) for arm, rows in pairs.items()}
    ahead |= together(
        {arm: one for arm, one in ahead.items() if arm != claim.than}
    )  # `than` is not compared with itself
    gains = together({arm: gap(rows, arm, BASE, claim.sample) for arm, rows in pairs.items()})
    whole = {arm: mean(rows[claim.than] - rows[BASE]) for arm, rows in pairs.items()}
    return [
        Recovered(arm, gains[arm], gains[arm].estimate / whole[arm] if whole[arm] > 0 else None, ahead[arm])
        for arm in pairs
    ]


def _left_out(cells: Frame, claim: Claim, count: int) -> str:
    """Why some pairs are left out of the comparison."""
    if not count:
        return ""
    own = cells[cells["arm"].isin([claim.better, claim.than]) & cells[claim.column].isna()]
    reasons = [f"{number} {status}" for status, number in own["status"].value_counts().items()]
    return f", {count} left out: {', '.join(reasons) or 'not run'}"


def _largest_share(claim: Claim, attributed: Attribution) -> tuple[Literal["for", "against", "undecided"], str]:
    """The second half of a claim: that its factor's share of the gap is the largest."""
    if claim.factor is None:
        return "for", ""
    if not attributed.shares:
        return "undecided", f", but without every mixture of the two ends nothing says that it is {claim.factor}'s"
    behind = [f for f, lead in attributed.leads.items() if lead.clear(claim.alpha) and lead.estimate < 0]
    if behind:
        return "against", f", but the share of {', '.join(behind)} is larger than that of {claim.factor}"
    open_ = [f for f, lead in attributed.leads.items() if not lead.clear(claim.alpha)]
    if open_:
        return "undecided", f", but that {claim.factor}'s share is larger than that of {', '.join(open_)} is not shown"
    return "for", f", and {claim.factor}'s share is the largest"


def attribution(
    cells: Frame,
    tables: GridTables,
    measure: str,
    factor: str | None = None,
    labels: Mapping[str, str] | None = None,
    sample: bool = False,
) -> Attribution:
    """Shapley share of every factor that differs between `design.start` and `design.end` in the gap between them,
    over the pairs that have every mixture of the two.

    Args:
        cells: The cells that ran.
        tables: The grid.
        measure: The column to look at.
        factor: The factor whose share is claimed to be the largest.
        labels: What arms are called in `cells`, where that is not their name.
        sample: Whether tasks are taken as a sample.
    """
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


@dataclass(frozen=True)
class Efficiency:
    """An arm's curve against the baseline's.

    Attributes:
        arm: The arm.
        area: Mean height over the baseline's curve on the log axis.
        equivalents: Number of examples of the arm -> how many the baseline needs for the same score.
    """

    arm: str
    area: Difference
    equivalents: dict[int, Equivalence]


def efficiency(cells: Frame, than: str, measure: str, sample: bool = False) -> list[Efficiency]:
    """Compare the curves over the numbers of examples, in the pairs that have all numbers."""
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
        own, baseline = both[arm][examples], both[than][examples]
        equivalents = {n: n_equivalence(baseline, own[n]) for n in examples}
        results[arm] = Efficiency(arm, area_between(own, baseline, sample), equivalents)
    areas = together({arm: one.area for arm, one in results.items()})
    return [replace(one, area=areas[arm]) for arm, one in results.items()]


def by_examples(
    cells: Frame, than: str, measure: str, sample: bool = False
) -> dict[str, dict[int, tuple[float, Difference | None]]]:
    """Arm -> number of examples -> its mean and its difference from `than` with as many (None: `than` itself, or no
    pair has both); p is corrected (Holm) over the whole table."""
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


def read_tables(grid: dict[str, Any]) -> GridTables:
    """The tables of a `grid.json`.

    Raises:
        ArmError: they are not those of a grid.
    """
    try:
        content = dict(grid["tables"])
        if "strength" not in content["claim"]:  # version 3 meant the tuned strength where it did not say "matched"
            content["claim"] = {"strength": "tuned", **content["claim"]}
        if "frontier" not in content["matched"]:  # version 4 measured arms at one KL, of its own tasks
            content["matched"] = {**content["matched"], "frontier": []}
            content["claim"] = {"tasks": "fixed", **content["claim"]}
        tables = GridTables(**content)
        arms, cells = [(arm["name"], arm["levels"]) for arm in grid["arms"]], grid["cells"]
        texts = [*(name for name, _ in arms), *cells, *grid["notes"], grid["command"]]
        if not all(isinstance(text, str) for text in texts) or tables.card is None or tables.claim is None:
            raise ValueError("names, cells, notes, command, [card] and [claim] are expected")
        if missing := {tables.claim.better, tables.claim.than} - {name for name, _ in arms}:
            raise ValueError(f"[claim] is about {sorted(missing)}, which are not arms of the grid")
        for point in (tables.design.start, tables.design.end) if tables.design.start and tables.design.end else ():
            if missing := [f for f, levels in tables.factors.items() if point.get(f) not in levels]:
                raise ValueError(f"design.start and design.end name no level of {missing}")
    except (KeyError, TypeError, ValueError) as error:
        raise ArmError(f"grid.json holds no grid: {type(error).__name__}: {error}") from error
    return tables


def answer(
    cells: Frame,
    claim: Claim,
    outcome: Verdict,
    attributed: Attribution,
    curves: Sequence[Efficiency],
    targets: Sequence[float] = (),
) -> list[str]:
    """The answer in three sentences, made from the numbers alone."""
    return [outcome.sentence, _shares(attributed, claim.alpha), _best(cells, claim, curves, targets)]


def _shares(attributed: Attribution, alpha: float) -> str:
    if not attributed.shares:
        return f"Shares of the gap are not computed: {attributed.why}."
    least, pairs = least_p([*attributed.shares.values()]), max(s.interval.pairs for s in attributed.shares.values())
    if least >= alpha:
        return (
            f"No factor's share of the gap can be clear: every mixture of its two ends is there in {pairs} "
            f"pair{'s' * (pairs > 1)} of task and seed, and p of {len(attributed.shares)} shares cannot be below "
            f"{least:.2g}."
        )
    clear = {f: share for f, share in attributed.shares.items() if share.clear(alpha)}
    if not clear:
        return "No factor's share of the gap between the two ends of the design is clearly not zero."
    largest_first = sorted(clear.items(), key=lambda item: -abs(item[1].estimate))
    parts = ", ".join(f"{factor} {share}" for factor, share in largest_first)
    rest = [factor for factor in attributed.shares if factor not in clear]
    sentence = f"Of the gap between the two ends of the design, clearly more or less than nothing comes from {parts}"
    return sentence + (f"; nothing can be said of {', '.join(rest)}." if rest else ".")


def _best(cells: Frame, claim: Claim, curves: Sequence[Efficiency], targets: Sequence[float]) -> str:
    wide = scores(cells, claim.column)
    whole = [arm for arm in wide if wide[arm].notna().all()]  # others have means over other pairs
    if 2 * len(whole) <= wide.shape[1]:
        return f"Which arm has the best mean is not said: {len(whole)} of {wide.shape[1]} have all pairs."
    reasons = {arm: why for arm in whole if (why := unfit(cells, arm, claim.strength, targets))}
    means = {arm: mean(wide[arm]) for arm in whole if arm not in reasons}
    left_out = f" Left out: {'; '.join(reasons.values())}." if reasons else ""
    if not means:
        return f"No arm has a best mean to speak of.{left_out}"
    best = max(means, key=means.__getitem__)
    which = "all arms" if len(means) == wide.shape[1] else f"the {len(means)} arms with every pair"
    if reasons:
        which = f"the {len(means)} arms that could win a claim"
    sentence = f"The best mean of {which} is {best}'s, {means[best]:.3f}.{left_out}"
    own = next((one for one in curves if one.arm == claim.better and len(one.equivalents) > 1), None)
    if own is None:
        return sentence
    n, count = next(iter(own.equivalents.items()))
    needs = f"To reach what {claim.better} reaches with {n} examples, {claim.than} needs {count} of them"
    return f"{needs}; t{sentence[1:]}"
