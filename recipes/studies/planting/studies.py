"""What a study of a planted problem says, and which of that is not so."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from steertune.recipes.ablation import analysis
from steertune.recipes.ablation.grid import Grid
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.statistics.factorial import effects
from steertune.recipes.ablation.statistics.paired import Difference, corrected
from steertune.recipes.studies.planting.teachers import FORMS


@dataclass(frozen=True)
class Study:
    """What one study says, and what it should.

    Attributes:
        means: Mean score of every arm, by form and layer.
        base: The base model's accuracy.
        named: The teacher's form has the highest mean at the right layer.
        form: The teacher's form is claimed: better than `bias`, or for a bias teacher, worse is claimed of another.
        layer: The right layer is claimed.
        shares: The Shapley shares that are clear, of form and layer.
        side: The verdict.
        false: Effects, shares and verdict: whether something is claimed there that is not so.
        false_by_p: The first if a claim took the permutation test only.
        gaps: Name of an effect -> what the study says of it.
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
    """What a study says."""
    claim = grid.tables.claim
    assert claim is not None
    found = analysis.attribution(cells, grid.tables, claim.measure)
    side = analysis.verdict(cells, claim, found).side
    gaps = {f"{e.factor} {e.level}": e.difference for e in effects(cells, ["form", "layer"], claim.measure)}
    means = cells.groupby(["form", "layer"])[claim.measure].mean()
    at_right = {form: float(means[form, "right"]) for form in FORMS}
    clear = {name: gap.estimate for name, gap in gaps.items() if gap.clear()}
    by_p = corrected([gap.permutation for gap in gaps.values()])
    by_p = {name: gap.estimate for (name, gap), p in zip(gaps.items(), by_p, strict=True) if p < 0.05}
    others = {name: gap for name, gap in clear.items() if name.startswith("form ")}
    form = max(others.values(), default=0.0) < 0 if problem == "bias" else others.get(f"form {problem}", 0.0) > 0
    shares = tuple(f for f, share in found.shares.items() if share.clear())
    return Study(
        means={(str(f), str(la)): float(v) for (f, la), v in means.items()},
        base=float(cells["base_accuracy"].mean()),
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
    """Whether something is claimed that is not so. With nothing to learn that is anything; else that a form other than
    the teacher's beats `bias`, that the teacher's loses to it, or that the wrong layer is better. Which of two forms
    that are not the teacher's is better is not known."""
    if problem not in FORMS:
        return bool(claimed)
    wrong = {f"form {form}" for form in FORMS if form != problem} if problem == "bias" else set()
    return (
        any(gap > 0 for name, gap in claimed.items() if name in wrong)
        or claimed.get(f"form {problem}", 0.0) < 0
        or claimed.get("layer wrong", 0.0) > 0
    )
