"""The mean of every measure, and the effect of every arm against its side effect."""

from __future__ import annotations

from math import ceil

import numpy as np
import pandas as pd
from scipy.stats import sem

from steertune.recipes.ablation import charts
from steertune.recipes.ablation.cells import column
from steertune.recipes.ablation.findings import Findings
from steertune.recipes.ablation.sections import ARROWS, section
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.statistics.rows import examples_of
from steertune.recipes.lab import measures
from steertune.recipes.lab.intervals import interval
from steertune.recipes.lab.pages import Block, Figure, Section, Table, Text, table_of
from steertune.recipes.lab.pages.side_effects import BESIDE, with_ends
from steertune.recipes.lab.rows import BASE, MATCHED, TUNED


@section(place=60)
def measured(findings: Findings) -> Section:
    """Effects and side effects: every measure that the cells have."""
    cells = findings.ran
    all_matched = findings.tables.budget.strengths == MATCHED  # then the tuned strength is the matched one
    at_tuned = "at the matched strength" if all_matched else "at the tuned strength"
    blocks: list[Block] = [
        *_tradeoff(findings, all_matched),
        Text(
            f"Means over an arm's cells, {at_tuned} (↑: higher is better, ↓: lower is better); in brackets, "
            "95 % for other pairs of task and seed. Dashed in the figure: the base model."
        ),
        *_side_by_side(findings, TUNED, "side_effects"),
        _means(cells, TUNED, "measures"),
    ]
    if not all_matched and cells[[column(name, MATCHED) for name in measures.names()]].notna().any(axis=None):
        blocks.append(Text("The same at the matched KL:"))
        blocks += _side_by_side(findings, MATCHED, "side_effects_matched")
        blocks.append(_means(cells, MATCHED, "measures_matched"))
    blocks += _resolution(cells)
    # judgements at two strengths are of the same answers
    both = [examples_of(column("judgements_failed", strength)) for strength in (TUNED, MATCHED)]
    counts = cells[both].map(lambda values: int(values.sum()) if isinstance(values, np.ndarray) else 0)
    if failed := int(counts.max(axis=1).sum()):
        blocks.append(Text(f"{failed} judgements failed; they are in no mean."))
    return Section("Effects and side effects", blocks)


RESOLUTION = 0.036
"""Standard error of a rate of one half over some 200 prompts."""


def _resolution(cells: Frame) -> list[Block]:
    """How precise the behaviour score of one cell is: the standard error over its prompts, by task."""
    errors: dict[str, tuple[float, int]] = {}
    for task, rows in cells.groupby("task", sort=False)[examples_of(column("behaviour", TUNED))]:
        scores = [values[np.isfinite(values)] for values in rows if isinstance(values, np.ndarray)]
        scores = [values for values in scores if len(values) > 1]
        if scores:
            # if all answers are alike they do not show how the rate varies; one half varies most
            error = max(sem(values) for values in scores) or 0.5 / len(scores[0]) ** 0.5
            errors[str(task)] = float(error), min(map(len, scores))
    if not errors:
        return []
    listed = "; ".join(f"{task} {error:.3f} ({count} prompts)" for task, (error, count) in errors.items())
    coarse = {task: ceil(count * (error / RESOLUTION) ** 2) for task, (error, count) in errors.items()}
    coarse = {task: needed for task, needed in coarse.items() if errors[task][0] > RESOLUTION}
    text = f"Standard error of one cell's behaviour score over its prompts, at most: {listed}."
    if coarse:
        text += (
            f" **Larger than {RESOLUTION:g} in {', '.join(coarse)}**, so that a single cell says little there; "
            f"{max(coarse.values())} prompts (`generations`) would be enough."
        )
    return [Text(text)]


def _means(cells: Frame, strength: str, name: str) -> Table:
    """A column for every measure, a row for every arm, the base model first."""
    names = [one for one in measures.ranked() if cells[column(one, strength)].notna().any()]
    columns = [column(one, strength) for one in names]
    base = ["(base model)", *(_mean(one, cells[column(one, BASE)], brackets=False) for one in names), ""]
    rows = [
        [str(arm), *(_mean(one, of_arm[column(one, strength)]) for one in names), str(len(of_arm))]
        for arm, of_arm in cells.dropna(subset=columns, how="all").groupby("arm", sort=False)
    ]
    headers = [f"{measures.get(one).heading}{ARROWS[measures.get(one).better]}" for one in names]
    return table_of(["arm", *headers, "cells"], [base, *rows], name)


def _mean(name: str, values: pd.Series, brackets: bool = True) -> str:
    """A mean over cells; the measures that are compared have an interval."""
    values = values.dropna()
    if values.empty:
        return ""
    if not brackets or name not in BESIDE:
        return f"{values.mean():.3f}"
    return with_ends(interval(values).within(measures.get(name).limits))


def _side_by_side(findings: Findings, strength: str, name: str) -> list[Block]:
    """Effect beside side effects, arm by arm."""
    cells = findings.ran
    columns = {column(one, strength): measures.get(one).heading.replace(", ", ",\n") for one in BESIDE}
    columns = {one: title for one, title in columns.items() if cells[one].notna().any()}
    if not columns:
        return []
    drawing = charts.side_by_side(cells.dropna(subset=[*columns], how="all"), columns, findings.colours)
    return [Figure(drawing, name, "Effect and side effects of every arm")]


def _tradeoff(findings: Findings, all_matched: bool) -> list[Block]:
    """A chart of effect against side effect: at the same KL, arms differ in fluency."""
    cells = findings.ran
    effect = "behaviour" if cells["behaviour@tuned"].notna().any() else "accuracy"
    side_effect = "perplexity" if all_matched else "kl"
    base = (float(cells["perplexity@0"].mean()) if all_matched else 0.0, float(cells[column(effect, BASE)].mean()))
    drawing = charts.pareto(
        cells,
        column(side_effect),
        column(effect),
        f"{measures.get(side_effect).heading}, on neutral text",
        measures.get(effect).heading,
        findings.colours,
        base,
    )
    return [] if drawing is None else [Figure(drawing, "pareto", "Effect against side effect")]
