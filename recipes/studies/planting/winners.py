"""How often a measure names the arm that is nearest to the teacher, and how often it makes a false claim."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from steertune.recipes.ablation.statistics.paired import difference
from steertune.recipes.lab import measures
from steertune.recipes.lab.intervals import rate, share_interval
from steertune.recipes.lab.measures import Array
from steertune.recipes.lab.pages import Section, Table, Text, table_of
from steertune.recipes.studies.planting.plants import KL, PLANTS
from steertune.recipes.studies.planting.students import COMPARISONS, TRUTH, TWINS, twin

ALPHA = 0.05
_NOT_LEARNED = ("judgements_failed", "repetition")  # they are about the judge, and about damage
NULL = "twins"
Results = Mapping[str, Mapping[str, Array]]
"""Arm -> measure -> its values on one task."""


def compared(tasks: Sequence[Results]) -> dict[str, dict[str, tuple[float, float]]]:
    """What every measure and the truth say about every comparison of two arms, from the results of one study's tasks.
    Tasks are treated as a sample, or the rows if there is only one task.

    Returns:
        Comparison -> measure -> by how much its first arm is better, and p.
    """
    pairs = COMPARISONS | {f"{NULL} {name}": (name, twin(name)) for name in TWINS}
    return {
        name: {measure: _better(tasks, first, second, measure) for measure in tasks[0][first]}
        for name, (first, second) in pairs.items()
        if first in tasks[0] and second in tasks[0]
    }


def _better(tasks: Sequence[Results], first: str, second: str, measure: str) -> tuple[float, float]:
    sign = 1.0 if measure != TRUTH and measures.get(measure).better == "higher" else -1.0
    gaps = [sign * (task[first][measure] - task[second][measure]) for task in tasks]
    if len(gaps) == 1:
        return float(np.nanmean(gaps[0])), _students_p(gaps[0][np.isfinite(gaps[0])])
    index = pd.MultiIndex.from_tuples([(i, 0) for i in range(len(gaps))], names=["task", "seed"])
    gap = difference(pd.Series(gaps, index=index, dtype=object), sample=True)
    return gap.estimate, gap.p


@dataclass(frozen=True)
class Look:
    """One measure's verdict in one comparison of one study, beside the truth's.

    Attributes:
        right: Whether it names the arm that the truth of all studies names; None if the truth is not clear.
        claims: Whether it claims its winner.
    """

    problem: str
    comparison: str
    measure: str
    right: bool | None
    claims: bool

    @property
    def null(self) -> bool:
        """Whether every claim is false: the two arms are the same arm, or there was nothing to learn."""
        return self.comparison.startswith(NULL) or (PLANTS[self.problem].nothing and self.pairs)

    @property
    def pairs(self) -> bool:
        """Whether the measure is about the answers of pairs, which a coin labelled."""
        return self.measure != TRUTH and "pairs" in measures.get(self.measure).needs


def truths(studies: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[float, float]]:
    """The truth about every problem and comparison.

    Returns:
        By how much the first arm is nearer to the teacher, and p of Student's t over the teachers of all studies.
    """
    of_studies: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    for study in studies:
        for comparison, says in study["comparisons"].items():
            if not PLANTS[study["problem"]].nothing and not comparison.startswith(NULL):
                of_studies.setdefault((study["problem"], comparison), []).append((*says[TRUTH], _teachers(study) - 1))
    return {at: _pooled(parts) for at, parts in of_studies.items()}


def _teachers(study: Mapping[str, Any]) -> int:
    return study["sizes"]["tasks"]


def _pooled(studies: Sequence[tuple[float, float, int]]) -> tuple[float, float]:
    """The mean of the estimates, and p of Student's t, from each study's estimate, p and degrees of freedom."""
    estimate = float(np.mean([one for one, _, _ in studies]))
    if all(freedom < 1 for _, _, freedom in studies):
        return estimate, _students_p(np.array([one for one, _, _ in studies]))  # every study is one teacher
    if any(freedom < 1 or p >= 1 for _, p, freedom in studies):
        return estimate, 1.0  # a single teacher does not show how teachers vary
    variances = [(one / stats.t.isf(p / 2, freedom)) ** 2 for one, p, freedom in studies]
    squares = sum(v**2 / freedom for v, (_, _, freedom) in zip(variances, studies, strict=True))
    error = sum(variances) ** 0.5 / len(studies)
    return estimate, 2 * float(stats.t.sf(abs(estimate) / error, sum(variances) ** 2 / squares))


def _students_p(values: Array) -> float:
    """p of Student's t that the mean is 0; 1 for a single value or identical values, which show nothing."""
    if len(values) < 2 or np.ptp(values) == 0:
        return 1.0
    test: Any = stats.ttest_1samp(values, 0.0)
    return float(test.pvalue)


def looks(studies: Sequence[Mapping[str, Any]]) -> list[Look]:
    """The verdicts of all measures in all studies. The truth is the one over all teachers, except in a study with a
    single teacher, where it is the truth about that teacher."""
    truth, verdicts = truths(studies), []
    for study in studies:
        for comparison, says in study["comparisons"].items():
            nearer, error = truth.get((study["problem"], comparison), (0.0, 1.0))
            if TRUTH in says and _teachers(study) == 1:
                nearer, error = says[TRUTH]
            for measure, (estimate, p) in says.items():
                right = bool(np.sign(estimate) == np.sign(nearer)) if error < ALPHA else None
                verdicts.append(Look(study["problem"], comparison, measure, right, bool(p < ALPHA and estimate != 0)))
    return verdicts


def trust_order(studies: Sequence[Mapping[str, Any]]) -> list[str]:
    """The measures of what was learned, the most trusted one first: the `trust` of a measure's file is its place here.

    Measures are ordered by how often they name the truth's winner, then by how seldom they claim the loser, then by
    how often they claim the winner. A measure whose interval of the first contains 50 % is left out, as are measures
    of damage, which say what an arm costs.
    """
    decided: dict[str, list[Look]] = {}
    for look in looks(studies):
        if look.right is not None and not look.null and look.measure != TRUTH:
            if "neutral" in measures.get(look.measure).needs or look.measure in _NOT_LEARNED:
                continue
            decided.setdefault(look.measure, []).append(look)

    def key(name: str) -> tuple[float, float, float, str]:
        verdicts = decided[name]
        lost = np.mean([look.claims and not look.right for look in verdicts])
        won = np.mean([bool(look.claims and look.right) for look in verdicts])
        return -float(np.mean([bool(look.right) for look in verdicts])), float(lost), -float(won), name

    trusted = [
        name for name, verdicts in decided.items() if share_interval([bool(look.right) for look in verdicts]).low > 0.5
    ]
    return sorted(trusted, key=key)


def sections(studies: Sequence[Mapping[str, Any]], ordered: bool = True) -> list[Section]:
    """The tables of a page; with `ordered`, also the order of the measures."""
    everything = looks(studies)
    names = [name for name in (*measures.ranked(), TRUTH) if any(look.measure == name for look in everything)]
    return [
        Section("What the truth says", [Text(_TRUTH), _truths(studies)]),
        Section("Which measure names the truth's winner", [Text(_WINNERS), _winners(everything, names)]),
        Section("False claims", [Text(_FALSE), _claims(everything, names)]),
        *([Section("The order", [Text(f"{_ORDER} {', '.join(trust_order(studies)) or 'None'}.")])] if ordered else []),
    ]


_TRUTH = (
    "By how much the first arm is nearer to the teacher than the second, in KL from the teacher (nats per token): the "
    "mean of all studies, with p of Student's t over their teachers, and in how many studies it is nearer. Below, the "
    "truth is called clear where p < 0.05; where a study has one teacher, by that teacher's fresh prompts. Where it "
    "is not clear, the plant does not tell these two arms apart, and tests no measure."
)
_WINNERS = (
    "In how many studies the arm that a measure prefers is the truth's winner, where the truth is clear; *all* has "
    f"the 95 % interval of Clopper and Pearson. All arms are compared at a KL of {KL:g} to the base. A measure that "
    "knows nothing is at 50 %. The last row is the truth itself as a single study sees it."
)
_FALSE = (
    "*Claims of nothing*: how often a measure claims a difference (p < 0.05, tasks as a sample) between an arm and "
    "the same arm trained on a second draw of the data, or, for measures of pairs, between any two arms where a coin "
    "chose the better answer (`coin`, `nothing`). The nominal rate is 5 %. *Claims the loser*: of comparisons whose "
    "truth is clear, how often a measure claims the arm that is further from the teacher. Intervals are those of "
    "Clopper and Pearson."
)


_ORDER = (
    "Measures of what was learned whose interval of *all* lies above 50 %, by how often they name the winner, then by "
    "how seldom they claim the loser, then by how often they claim the winner:"
)


def _truths(studies: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for (problem, comparison), (nearer, p) in truths(studies).items():
        of_problem = [study["comparisons"] for study in studies if study["problem"] == problem]
        says = [one[comparison][TRUTH][0] for one in of_problem if comparison in one]
        first, second = COMPARISONS[comparison]
        won = f"{sum(estimate > 0 for estimate in says)} of {len(says)}"
        rows.append([problem, f"{first} against {second}", f"{nearer:+.3f}", f"{p:.2g}", won])
    header = ["problem", "arms", "nearer by", "p", "studies in which it is nearer"]
    return table_of(header, rows, "truth")


def _winners(everything: Sequence[Look], names: Sequence[str]) -> Table:
    decided = [look for look in everything if look.right is not None and not look.null]
    columns = [(p, c) for p in PLANTS for c in COMPARISONS
               if any((look.problem, look.comparison) == (p, c) for look in decided)]  # fmt: skip
    rows = []
    for name in names:
        chosen = [look for look in decided if look.measure == name]
        shares = [[bool(look.right) for look in chosen if (look.problem, look.comparison) == at] for at in columns]
        rows.append(
            [
                name,
                *(f"{np.mean(s):.0%}" if s else "" for s in shares),
                rate([bool(look.right) for look in chosen]),
            ]
        )
    return table_of(["measure", *(f"{p}: {c}" for p, c in columns), "all"], rows, "winners")


def _claims(everything: Sequence[Look], names: Sequence[str]) -> Table:
    def of(name: str, keep: Callable[[Look], bool]) -> list[Look]:
        return [look for look in everything if look.measure == name and keep(look)]

    rows = []
    for name in names:
        nulls = of(name, lambda look: look.null)
        decided = of(name, lambda look: look.right is not None and not look.null)
        lost = [look.claims and not look.right for look in decided]
        won = [bool(look.claims and look.right) for look in decided]
        rows.append(
            [name, str(len(nulls)), rate([look.claims for look in nulls]), str(len(decided)), rate(won), rate(lost)]
        )
    header = ["measure", "nulls", "claims of nothing", "decided", "claims the winner", "claims the loser"]
    return table_of(header, rows, "claims")
