"""Every arm against the claim's baseline."""

from __future__ import annotations

import pandas as pd

from steertune.recipes.ablation import analysis
from steertune.recipes.ablation.findings import Findings
from steertune.recipes.ablation.sections import COMPARED, numbers, reach, section
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.lab.pages import Block, Section, Text, table_of


@section(place=30)
def comparisons(findings: Findings) -> Section:
    """Every arm against the claim's baseline."""
    claim, cells = findings.claim, findings.paired
    title, wide = f"Arms against {claim.than}", analysis.scores(cells, claim.column)
    if claim.than not in wide:
        return Section(title, [Text(f"{claim.than} has no {claim.label}.")])
    gaps = sorted(
        analysis.comparisons(cells, claim.than, claim.column, claim.sample), key=lambda c: -c.difference.estimate
    )
    rows = [[gap.arm, f"{gap.mean:.3f}", *numbers(gap.difference)] for gap in gaps]
    itself = analysis.mean(wide[claim.than].dropna())
    what = f"{claim.label}; {claim.than} itself has {itself:.3f}."
    blocks = [
        Text(what[0].upper() + what[1:]),
        table_of(["arm", "mean", f"minus {claim.than}", *COMPARED], rows, "comparisons"),
        *reach([gap.difference for gap in gaps]),
        *_absent(findings, {claim.than, *(gap.arm for gap in gaps)}),
    ]
    return Section(title, blocks)


def _absent(findings: Findings, compared: set[str]) -> list[Block]:
    """Why other arms are not in the table."""
    claim, cells = findings.claim, findings.paired
    absent = [arm for arm in dict.fromkeys(cells["arm"]) if arm not in compared]
    rigid = [arm for arm in absent if claim.strength != "tuned" and not _has_strength(cells, arm)]
    others = [arm for arm in absent if arm not in rigid]
    notes: list[Block] = []
    if rigid:
        notes.append(Text(f"Not compared, because they have no strength that could be matched: {', '.join(rigid)}."))
    if others:
        measured = f"{claim.label} of them with every number of examples"
        notes.append(Text(f"Not compared, because no pair of task and seed has {measured}: {', '.join(others)}."))
    return notes


def _has_strength(cells: Frame, arm: str) -> bool:
    scalable = cells.loc[cells["arm"] == arm, "scalable"] if "scalable" in cells else pd.Series([True])
    return bool((scalable != False).any())  # noqa: E712  None for a failed cell
