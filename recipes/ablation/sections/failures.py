"""Cells that failed, diverged or could not be matched."""

from __future__ import annotations

from steertune.recipes.ablation.findings import Findings
from steertune.recipes.ablation.sections import section
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.lab.pages import Section, Text, table_of

_LONGEST = 160


@section(place=80)
def failures(findings: Findings) -> Section:
    """Every cell that is not "ok"."""
    return failed_cells(findings.cells)


def failed_cells(cells: Frame) -> Section:
    """The section, also for a report in which nothing ran."""
    bad = cells[cells["status"] != "ok"]
    if bad.empty:
        return Section("Failures", [Text("None: every cell ran and none diverged.")])
    rows = [
        [r.task, str(r.examples), str(r.seed), r.arm, r.status, (str(r.error).splitlines() or ["no message"])[0]]
        for r in bad.itertuples()
    ]
    rows = [[*row[:-1], row[-1][:_LONGEST]] for row in rows]
    note = (
        "A diverged cell counts as the base model in every comparison. A failed one counts nowhere, and an unmatched "
        "one nowhere at matched KL: its whole pair is left out, which a verdict allows for one pair in ten."
    )
    return Section(
        "Failures", [Text(note), table_of(["task", "n", "seed", "arm", "status", "error"], rows, "failures")]
    )
