"""How much each factor contributes to the gap between the two ends of the design."""

from __future__ import annotations

from steertune.recipes.ablation import charts
from steertune.recipes.ablation.designs import Combination
from steertune.recipes.ablation.findings import Findings
from steertune.recipes.ablation.labels import combination_label
from steertune.recipes.ablation.levels import arm_name
from steertune.recipes.ablation.sections import COMPARED, emphasised, numbers, reach, section
from steertune.recipes.lab.pages import Figure, Section, Text, table_of


@section(place=10)
def attribution(findings: Findings) -> Section | None:
    """Shapley shares of the gap between the two ends of the design."""
    shares, design = findings.shares.shares, findings.tables.design
    if not shares:
        return None
    label = f"share of the gap in {findings.claim.label}"
    total = sum(share.estimate for share in shares.values())
    drawing = charts.intervals({factor: share.shown for factor, share in shares.items()}, label)
    start, end = (_arm(findings, combination) for combination in (design.start, design.end))
    blocks = [
        Text(f"Exact Shapley shares of the gap ({total:+.3f}) from {start} to {end}."),
        Figure(drawing, "attribution", "Shapley share of every factor"),
        table_of(["factor", "share", *COMPARED], [[f, *numbers(share)] for f, share in shares.items()], "attribution"),
        *reach([*shares.values()]),
    ]
    return Section("Attribution", blocks)


def _arm(findings: Findings, combination: Combination) -> str:
    """The label of a combination's arm; its levels if the grid runs no such arm."""
    label = findings.labels.get(arm_name(findings.tables, combination))
    return f"*{combination_label(combination)}*" if label is None else emphasised(label, findings)
