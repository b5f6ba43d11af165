"""What a grid's cells say: comparisons with the baseline, the verdict on the claim, attribution, sample efficiency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from steertune.recipes.ablation import designs
from steertune.recipes.ablation.levels import patched
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.statistics.curves import Equivalence, area_between, n_equivalence
from steertune.recipes.ablation.statistics.paired import Interval, corrected, crossed_interval, interval, p_value
from steertune.recipes.ablation.statistics.shapley import shares
from steertune.recipes.ablation.tables import Claim, GridTables
from steertune.recipes.arm import ArmError

MEASURES = {
    "accuracy": "held-out pair accuracy at the tuned strength",
    "matched_accuracy": "held-out pair accuracy at matched KL",
    "margin_gain": "gain in held-out margin (nats) at the tuned strength",
    "matched_margin_gain": "gain in held-out margin (nats) at matched KL",
    "behaviour": "behaviour score of free generations at the tuned strength",
}


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline on one measure; positive is better than the baseline.

    Attributes:
        arm: The arm.
        mean: The arm's own mean.
        interval: Of the difference, over pairs of task and seed.
        crossed: The same for other test rows too; None where the measure has none.
        p: Permutation test, corrected (Holm) over all arms of the table.
    """

    arm: str
    mean: float
    interval: Interval
    crossed: Interval | None
    p: float


@dataclass(frozen=True)
class Verdict:
    """What the result says about the claim."""

    side: Literal["for", "against", "undecided"]
    sentence: str


def scores(cells: Frame, measure: str) -> Frame:
    """Mean over the numbers of examples, by (task, seed) and arm; a pair in which an arm has no number is NaN."""
    wide = cells.pivot_table(index=["task", "seed", "examples"], columns="arm", values=measure, dropna=False)
    complete = wide.notna().groupby(level=["task", "seed"]).all()
    return wide.groupby(level=["task", "seed"]).mean().where(complete)


def comparisons(cells: Frame, than: str, measure: str) -> list[Comparison]:
    """Every arm against `than`, paired by task and seed."""
    wide = scores(cells, measure)
    found = []
    for arm in (a for a in dict.fromkeys(cells["arm"]) if a != than and a in wide and than in wide):
        gap = (wide[arm] - wide[than]).dropna()
        if len(gap):
            mean = float(wide.loc[gap.index, arm].mean())
            found.append(Comparison(arm, mean, interval(gap), _crossed(cells, arm, than, measure), p_value(gap)))
    together = corrected([c.p for c in found])
    return [Comparison(**{**vars(c), "p": p}) for c, p in zip(found, together, strict=True)]


def _crossed(cells: Frame, arm: str, than: str, measure: str) -> Interval | None:
    column = {"accuracy": "margins", "matched_accuracy": "matched_margins"}.get(measure)
    if column is None or column not in cells:
        return None
    tasks = []
    for _, rows in cells[cells["arm"].isin([arm, than])].groupby("task"):
        seeds = []
        for _, of_seed in rows.groupby("seed"):
            gaps = []
            for _, pair in of_seed.groupby("examples"):
                both = pair.set_index("arm")[column]
                if {arm, than} <= set(both.index) and all(isinstance(both[a], list) for a in (arm, than)):
                    first, second = (np.sign(np.asarray(both[a])) / 2 for a in (arm, than))
                    gaps.append(first - second)
            if gaps:
                seeds.append(np.mean(gaps, axis=0))
        if seeds:
            tasks.append(np.array(seeds))
    return crossed_interval(*tasks) if tasks else None


def verdict(cells: Frame, claim: Claim) -> Verdict:
    """Whether the claim's comparison came out for it, against it, or neither."""
    wide = scores(cells, claim.measure)
    missing = [arm for arm in (claim.better, claim.than) if arm not in wide or wide[arm].isna().all()]
    if missing:
        return Verdict("undecided", f"{missing} have no {MEASURES[claim.measure]}, so the claim cannot be decided.")
    gap = (wide[claim.better] - wide[claim.than]).dropna()
    if gap.empty:
        return Verdict("undecided", "No pair of task and seed has both arms of the claim yet.")
    found, p = interval(gap), p_value(gap)
    crossed = _crossed(cells, claim.better, claim.than, claim.measure)
    better, than = (wide.loc[gap.index, arm].mean() for arm in (claim.better, claim.than))
    what = (
        f"{claim.better} has {better:.3f} {MEASURES[claim.measure]}, {claim.than} has {than:.3f}: a difference of "
        f"{found} (95 %, {found.pairs} pairs of task and seed, p = {p:.3g})"
    )
    if p < claim.alpha and found.excludes_zero:
        side = "for" if found.estimate > 0 else "against"
        rows = "" if crossed is None or crossed.excludes_zero else ", though with other test rows it could be none"
        return Verdict(side, f"{what}, {'more' if side == 'for' else 'less'} than the baseline{rows}.")
    least = 2 / 2**found.pairs
    why = f"; {found.pairs} pairs cannot give a p below {least:.2g}" if least >= claim.alpha else ""
    return Verdict("undecided", f"{what}, which is no difference that can be claimed{why}.")


def attribution(cells: Frame, tables: GridTables, measure: str) -> dict[str, Interval] | None:
    """Shapley share of every factor that differs between `design.start` and `design.end` in the gap between them;
    None unless every mixture of the two was run."""
    start, end = tables.design.start, tables.design.end
    if not start or not end:
        return None
    moving = [factor for factor in tables.factors if start[factor] != end[factor]]
    wide = scores(cells, measure)
    names = {
        frozenset(f for f in moving if mixture[f] == end[f]): arm_name(tables, mixture)
        for mixture in designs.mixtures({f: list(levels) for f, levels in tables.factors.items()}, start, end)
    }
    if any(name not in wide for name in names.values()):
        return None
    complete = wide[sorted(set(names.values()))].dropna()
    if complete.empty:
        return None
    return shares({coalition: complete[name].to_numpy() for coalition, name in names.items()}, moving)


def arm_name(tables: GridTables, combination: dict[str, str]) -> str:
    """Name of a combination's arm."""
    levels, _ = patched(tables, combination)
    return ",".join(f"{factor}={level}" for factor, level in levels.items())


@dataclass(frozen=True)
class Efficiency:
    """An arm's curve against the baseline's.

    Attributes:
        arm: The arm.
        area: Mean height over the baseline's curve on the log axis.
        equivalents: Number of examples of the arm -> how many the baseline needs for the same score.
    """

    arm: str
    area: Interval
    equivalents: dict[int, Equivalence]


def efficiency(cells: Frame, than: str, measure: str) -> list[Efficiency]:
    """Curves over the numbers of examples, of the pairs that have all of them."""
    examples = sorted(int(n) for n in cells["examples"].unique())
    wide = cells.pivot_table(index=["task", "seed"], columns=["arm", "examples"], values=measure)
    if than not in wide.columns.get_level_values(0):
        return []
    found = []
    for arm in (a for a in dict.fromkeys(cells["arm"]) if a != than and a in wide.columns.get_level_values(0)):
        columns = [(a, n) for a in (arm, than) for n in examples]
        if any(column not in wide.columns for column in columns):
            continue
        both = wide[columns].dropna()
        if both.empty:
            continue
        own, baseline = both[arm].to_numpy(), both[than].to_numpy()
        equivalents = {n: n_equivalence(examples, baseline, own[:, i]) for i, n in enumerate(examples)}
        found.append(Efficiency(arm, area_between(examples, own, baseline), equivalents))
    return found


def read_tables(grid: dict[str, Any]) -> GridTables:
    """The tables of a `grid.json`.

    Raises:
        ArmError: they are not those of a grid.
    """
    try:
        return GridTables(**grid["tables"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArmError(f"grid.json holds no grid: {error}") from error


def answer(
    cells: Frame,
    claim: Claim,
    said: Verdict,
    shapley: dict[str, Interval] | None,
    curves: Sequence[Efficiency],
) -> list[str]:
    """The answer in three sentences, all of it from the numbers."""
    sentences = [said.sentence]
    if shapley:
        clear = {f: i for f, i in shapley.items() if i.excludes_zero}
        parts = ", ".join(f"{f} {i}" for f, i in sorted(clear.items(), key=lambda x: -abs(x[1].estimate)))
        rest = [f for f in shapley if f not in clear]
        sentences.append(
            (f"Of the gap between the two ends of the design, clearly more or less than nothing comes from {parts}"
             if clear else "No factor's share of the gap between the two ends of the design is clearly not zero")
            + (f"; nothing can be said of {', '.join(rest)}." if rest else ".")
        )  # fmt: skip
    else:
        sentences.append(
            "Shares of the gap are not computed: that takes every mixture of a `design.start` and a `design.end`."
        )
    wide = scores(cells, claim.measure)
    means = wide.mean().dropna()
    if means.empty:
        return [*sentences, f"No arm has any {MEASURES[claim.measure]}."]
    best = means.idxmax()
    own = next((e for e in curves if e.arm == claim.better), None)
    several = own is not None and len(own.equivalents) > 1
    needs = ""
    if several and own is not None:
        n, count = next(iter(own.equivalents.items()))
        needs = f"To reach what {claim.better} reaches with {n} examples, {claim.than} needs {count} of them; "
    sentences.append(f"{needs}{'t' if needs else 'T'}he best mean of all arms is {best}'s, {wide[best].mean():.3f}.")
    return sentences
