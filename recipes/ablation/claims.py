"""Decide whether the result of a grid counts for its claim, overall and by task, and answer in three sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from steertune.recipes.ablation.analysis import Attribution, Efficiency, gap, mean, scores
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.statistics.paired import Difference, difference, least_p, smallest_p, together
from steertune.recipes.ablation.statistics.rows import with_base
from steertune.recipes.ablation.strengths import IS_EXTRAPOLATED, extrapolated, short, unfit
from steertune.recipes.ablation.tables import Claim

_LEFT_OUT = 0.1  # share of the pairs
BASE = "the base model"


@dataclass(frozen=True)
class Verdict:
    """Whether the result counts for the claim, and why, in a sentence."""

    side: Literal["for", "against", "undecided"]
    sentence: str


def verdict(
    cells: Frame,
    claim: Claim,
    attributed: Attribution = Attribution(),  # noqa: B008
    planned: int = 0,
    targets: Sequence[float] = (),
) -> Verdict:
    """Decide the claim: for it if `better` is clearly more than `margin` ahead and the share of the factor that it
    names, if any, is clearly the largest; against it if one of the two clearly fails; else undecided.

    Args:
        cells: All cells, failed ones too.
        claim: The claim.
        attributed: The result of `attribution` for the claim's measure.
        planned: Number of pairs of task and seed in the grid, run or not; 0 for as many as the cells have.
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
    ahead_arm, behind_arm = (claim.better, claim.than)[:: 1 if over.estimate > 0 else -1]
    what = _what(cells, claim, both, plain, over.p, all_pairs) + _limits_of(behind_arm, cells, targets)
    if taken := _seen_before(cells, claim, both):
        return Verdict(
            "undecided",
            f"{what}; but in {taken} pairs both arms were taken from another grid, whose result could be seen when "
            "this card was written, and what is claimed after a look counts for nothing.",
        )
    if all_pairs - pairs > _LEFT_OUT * all_pairs:
        return Verdict(
            "undecided", f"{what}; with more than {_LEFT_OUT:.0%} of the pairs left out nothing is decided."
        )
    gain = None if claim.recovers is None else difference(both[claim.than] - both[BASE], claim.sample)
    if gain is not None and not (gain.clear(claim.alpha) and gain.estimate > 0):
        return Verdict(
            "undecided",
            f"{what}; but {claim.than} has no clear gain over the base ({gain}) to take a share of.",
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


def _what(cells: Frame, claim: Claim, both: Frame, gap: Difference, p: float, all_pairs: int) -> str:
    """The comparison of the claim's two arms, as a clause."""
    pairs = gap.interval.pairs
    return (
        f"{claim.better} has {mean(both[claim.better]):.3f} {claim.label}, {claim.than} has "
        f"{mean(both[claim.than]):.3f}: {_compared(both, claim)} {gap} ({_reach(gap)}, given the settings chosen; "
        f"{pairs} of {all_pairs} pairs of task and seed{_left_out(cells, claim, all_pairs - pairs)}; "
        f"p = {p:.3g}{f' that it is not {claim.margin:g}' if claim.margin else ''})"
    )


def _limits_of(behind: str, cells: Frame, targets: Sequence[float]) -> str:
    """Possible reasons why an arm is behind, as clauses to append."""
    of_arm, clauses = cells[cells["arm"] == behind], ""
    if short(of_arm, targets):  # so the two are not at the same KL
        clauses += f"; {behind} stops short of KL {max(targets):g} in some cells and counts with its last point"
    if extrapolated(of_arm, targets):
        clauses += f"; {behind} {IS_EXTRAPOLATED}"
    return clauses


def _seen_before(cells: Frame, claim: Claim, pairs: Frame) -> int:
    """For how many combinations of task, number of examples and seed both arms were taken from another grid; 0 if
    these are too few to matter."""
    if "taken_over" not in cells:
        return 0
    taken = cells[(cells["taken_over"] == True) & cells["arm"].isin([claim.better, claim.than])]  # noqa: E712
    seen = int((taken.groupby(["task", "examples", "seed"])["arm"].nunique() == 2).sum())
    return seen if seen > _LEFT_OUT * len(pairs) else 0


def _left_out(cells: Frame, claim: Claim, count: int) -> str:
    """Why some pairs are left out of the comparison."""
    if not count:
        return ""
    missing = cells[cells["arm"].isin([claim.better, claim.than]) & cells[claim.column].isna()]
    reasons = [f"{number} {status}" for status, number in missing["status"].value_counts().items()]
    return f", {count} left out: {', '.join(reasons) or 'not run'}"


def _compared(both: Frame, claim: Claim) -> str:
    if claim.recovers is None:
        return "a difference of"
    base, better, than = (mean(both[arm]) for arm in (BASE, claim.better, claim.than))
    share = f"{(better - base) / (than - base):.2f}" if than > base else "no share"
    return f"{share} of its gain over the base's {base:.3f}, and more than {claim.recovers:g} of it by"


def _reach(difference: Difference) -> str:
    """What the interval of a claim allows for."""
    if difference.sample:
        within = replace(difference, sample=False)
        return f"95 %, for other tasks like these; within these tasks {str(within).partition(' ')[2]}"
    return "95 %, for other seeds and test rows of these tasks"


def _largest_share(claim: Claim, attributed: Attribution) -> tuple[Literal["for", "against", "undecided"], str]:
    """The second half of a claim: that its factor's share of the gap is the largest."""
    if claim.factor is None:
        return "for", ""
    if not attributed.shares:
        return "undecided", f", but without every mixture of the two ends it cannot be attributed to {claim.factor}"
    behind = [f for f, lead in attributed.leads.items() if lead.clear(claim.alpha) and lead.estimate < 0]
    if behind:
        return "against", f", but the share of {', '.join(behind)} is larger than that of {claim.factor}"
    open_ = [f for f, lead in attributed.leads.items() if not lead.clear(claim.alpha)]
    if open_:
        return "undecided", f", but that {claim.factor}'s share is larger than that of {', '.join(open_)} is not shown"
    return "for", f", and {claim.factor}'s share is the largest"


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
        than: Mean of the claim's `than`.
        better: Mean of the claim's `better`.
        ahead: How far `better` is ahead; p is not corrected.
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


@dataclass(frozen=True)
class Recovered:
    """How much of another arm's gain over the base model an arm reaches.

    Attributes:
        gain: Gain over the base model.
        share: Mean gain divided by the mean gain of the claim's `than`; None if `than` gains nothing.
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
            f"pair{'s' * (pairs > 1)} of task and seed, and p of {len(attributed.shares)} "
            f"share{'s' * (len(attributed.shares) > 1)} cannot be below "
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
        return f"No best mean is given, because only {len(whole)} of {wide.shape[1]} arms have all pairs."
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
    if len(means) == 1:
        sentence = f"The only arm that could win a claim is {best}, with a mean of {means[best]:.3f}.{left_out}"
    curve = next((one for one in curves if one.arm == claim.better and len(one.equivalents) > 1), None)
    if curve is None:
        return sentence
    n, count = next(iter(curve.equivalents.items()))
    needs = f"To reach what {claim.better} reaches with {n} examples, {claim.than} needs {count} of them"
    return f"{needs}; t{sentence[1:]}"
