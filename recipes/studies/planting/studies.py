"""What a study of a planted problem claims, and which of its claims are false."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from steertune.recipes.ablation import analysis, claims
from steertune.recipes.ablation.grid import Grid
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.statistics.factorial import effects
from steertune.recipes.ablation.statistics.paired import Difference, corrected
from steertune.recipes.studies.planting import FORMS


@dataclass(frozen=True)
class Study:
    """The claims of one study, compared with what was planted.

    Attributes:
        means: Mean score of every arm, by form and layer.
        named: The teacher's form has the highest mean at the right layer.
        form: The study claims that the teacher's form is better than `bias` or, for a bias teacher, that another form
            is worse.
        layer: The study claims that the right layer is better.
        shares: The factors, of form and layer, with a clear Shapley share.
        side: The verdict: for, against or undecided.
        false: Whether there is a false claim among the effects, the shares, and the verdict.
        false_by_p: Whether there is a false effect if the permutation test alone decides.
        gaps: Name of an effect -> its size with intervals.
    """

    means: dict[tuple[str, str], float]
    base: float
    named: bool
    form: bool
    layer: bool
    shares: tuple[str, ...]
    side: str
    false: tuple[bool, bool, bool]
    false_by_p: bool
    gaps: dict[str, Difference]


def read_study(problem: str, grid: Grid, cells: Frame) -> Study:
    """The claims of a study."""
    claim = grid.tables.claim
    assert claim is not None

    # what the report would say: verdict, shares, and the effect of every form and layer
    attribution = analysis.attribution(cells, grid.tables, claim.column)
    side = claims.verdict(cells, claim, attribution).side
    shares = tuple(factor for factor, share in attribution.shares.items() if share.clear())
    gaps = {f"{e.factor} {e.level}": e.difference for e in effects(cells, ["form", "layer"], claim.column)}
    clear = {name: gap.estimate for name, gap in gaps.items() if gap.clear()}
    by_p = corrected([gap.permutation for gap in gaps.values()])
    by_p = {name: gap.estimate for (name, gap), p in zip(gaps.items(), by_p, strict=True) if p < 0.05}

    # the teacher's form: does it have the best mean, and does the study claim it?
    means = cells.groupby(["form", "layer"])[claim.column].mean()
    at_right = {form: float(means[form, "right"]) for form in FORMS}
    others = {name: gap for name, gap in clear.items() if name.startswith("form ")}
    form = max(others.values(), default=0.0) < 0 if problem == "bias" else others.get(f"form {problem}", 0.0) > 0
    return Study(
        means={(str(f), str(la)): float(v) for (f, la), v in means.items()},
        base=float(cells["accuracy@0"].mean()),
        named=max(at_right, key=lambda form: (not np.isnan(at_right[form]), at_right[form])) == problem,
        form=form,
        layer=clear.get("layer wrong", 0.0) < 0,
        shares=shares,
        side=side,
        false=(
            _false(problem, clear),
            problem not in FORMS and bool(shares),
            problem not in FORMS and side != "undecided",
        ),
        false_by_p=_false(problem, by_p),
        gaps=gaps,
    )


def _false(problem: str, claimed: dict[str, float]) -> bool:
    """Whether one of the claimed effects is false.

    With nothing to learn, every claim is false. Otherwise a claim is false if it says that a form other than the
    teacher's beats a `bias` teacher's, that the teacher's form loses to `bias`, or that the wrong layer is better.
    Which of two forms is better is unknown if neither is the teacher's.
    """
    if problem not in FORMS:
        return bool(claimed)
    wrong = {f"form {form}" for form in FORMS if form != problem} if problem == "bias" else set()
    return (
        any(gap > 0 for name, gap in claimed.items() if name in wrong)
        or claimed.get(f"form {problem}", 0.0) < 0
        or claimed.get("layer wrong", 0.0) > 0
    )
