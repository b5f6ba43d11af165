"""The limits of the result."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from steertune.recipes.ablation.cells import column
from steertune.recipes.ablation.findings import Findings
from steertune.recipes.ablation.sections import section
from steertune.recipes.ablation.sections.damage import has_both_kinds
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.statistics.rows import examples_of
from steertune.recipes.ablation.strengths import TRAINED
from steertune.recipes.lab import measures
from steertune.recipes.lab.pages import Section, Text
from steertune.recipes.lab.pair_lint import EDGE
from steertune.recipes.lab.rows import TUNED

ENOUGH_TASKS, ENOUGH_ANSWERS = 8, 200
CUT = 0.05
"""Share of a task's answers that must be cut off for the page to say so."""


@section(place=80)
def limits(findings: Findings) -> Section | None:
    """The limits of tasks, measure, strengths and damage that the cells themselves show."""
    every = (_tasks, _measure, _answers, _cut, _edges, _strengths, _matching)
    lines = [line for limit in every if (line := limit(findings))]
    if not has_both_kinds(findings):
        lines.append(
            "Damage: only one kind of side effect was measured, and neutral text may show the behaviour itself."
        )
    return Section("What it cannot say", [Text("\n".join(f"- {line}" for line in lines))]) if lines else None


def _tasks(findings: Findings) -> str:
    count = findings.paired["task"].nunique()
    if not findings.claim.sample:
        return (
            f"Tasks: the claim is about the {count} it ran on (as fixed). What is clear here need not hold for "
            "others, for which the tables have intervals of their own."
        )
    if count >= ENOUGH_TASKS:
        return ""
    if count == 1:
        return f"Tasks: one says nothing about others; {ENOUGH_TASKS} or more would be better."
    return f"Tasks: {count} of them are too few to stand for others; {ENOUGH_TASKS} or more would be better."


def _measure(findings: Findings) -> str:
    if findings.claim.measure != "accuracy":
        return ""
    return (
        "Length: pair accuracy adds up log-probabilities over an answer, so that a longer answer is less likely "
        "whatever it says. Where the answers of a pair differ in length, it measures that too, and it is not what a "
        "model writes."
    )


def _answers(findings: Findings) -> str:
    values = findings.ran[examples_of(column("behaviour", TUNED))]
    counts = [len(scores) for scores in values if isinstance(scores, np.ndarray)]
    if not counts:
        return "Behaviour: no answers were generated, so nothing here is about what the models write."
    if min(counts) >= ENOUGH_ANSWERS:
        return ""
    return f"Behaviour: {min(counts)} answers a cell are few; {ENOUGH_ANSWERS} would know a rate within 0.07."


def _cut(findings: Findings) -> str:
    """Answers that the limit of tokens cut off, so that whatever stands at their end is missing."""
    tables, shares = findings.tables, findings.ran[["task", column("cut_off", TUNED)]].dropna()
    if not tables.generations:
        return ""
    missed = "What a task shows only at the end of an answer is missed there"
    if shares.empty:
        return (
            f"Length of answers: they were cut at {tables.new_tokens} tokens (`new_tokens`), and these cells do not "
            f"say how many reached that. {missed}."
        )
    by_task = shares.groupby("task", sort=False)[column("cut_off", TUNED)].mean()
    if by_task.max() < CUT:
        return ""
    listed = ", ".join(f"{task} {share:.0%}" for task, share in by_task.items())
    return f"Length of answers: {tables.new_tokens} tokens (`new_tokens`) cut off {listed} of them. {missed}."


def _edges(findings: Findings) -> str:
    """Tasks that do not distinguish arms, because all of them are at the lowest or highest value of the measure."""
    claim = findings.claim
    low, high = measures.get(claim.measure).limits
    if not math.isfinite(high - low):
        scores = [values for values in findings.ran[examples_of(claim.column)] if isinstance(values, np.ndarray)]
        # a rule or a classifier gives a share or a probability, where other scorers have no limits
        if not scores or not all(np.all((values >= 0) & (values <= 1) | np.isnan(values)) for values in scores):
            return ""
        low, high = 0.0, 1.0
    means = findings.ran.groupby(["task", "arm"], sort=False)[claim.column].mean().dropna()
    places = {"floor": means <= low + EDGE * (high - low), "ceiling": means >= high - EDGE * (high - low)}
    lines = []
    for place, near in places.items():
        if tasks := [str(task) for task, of_task in near.groupby(level="task", sort=False) if of_task.all()]:
            lines.append(f"every arm is at the {place} in {', '.join(tasks)}")
    if not lines:
        return ""
    return f"Range: {'; '.join(lines)} ({claim.label}), so that nothing there tells arms apart."


def _strengths(findings: Findings) -> str:
    """Trained arms that are used far from the strength that they were trained at, where arms are compared."""
    cells = findings.ran
    if not {"setting_steps", "matched_strength"} <= {*cells}:
        return ""
    trained = cells[cells["setting_steps"] > 0]
    matched = findings.tables.matched
    strengths = {kl: _used_at(trained, kl) for kl in matched.targets_of(findings.claim.strength) or [matched.kl]}
    low, high = TRAINED
    outside = {kl: int(((used < low) | (used > high)).sum()) for kl, used in strengths.items()}
    if not any(outside.values()):
        return ""
    cases = [
        f"{count} of {len(strengths[kl])} trained cells reach a KL of {kl:g} only outside strengths of {low:g} to "
        f"{high:g} ({strengths[kl].min():.2g} to {strengths[kl].max():.2g})"
        for kl, count in outside.items()
        if count
    ]
    return f"Strengths: {'; '.join(cases)}. They are extrapolated: what was trained is used at another strength."


def _used_at(cells: Frame, kl: float) -> NDArray[np.float64]:
    """The strengths at which cells reach a KL."""
    points = [point for cell in cells.get("frontier", []) if isinstance(cell, list) for point in cell]
    if points:
        return np.array([point["strength"] for point in points if point["target"] == kl and point["reached"]])
    return cells["matched_strength"].dropna().to_numpy(float)  # of an older version, which matched one KL


def _matching(findings: Findings) -> str:
    if "frontier" in findings.ran:
        return ""
    return (
        "KL: strengths were matched at one KL, on the same few neutral rows on which side effects are reported. Equal "
        "there is not equal on other text, nor at another KL."
    )
