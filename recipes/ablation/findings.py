"""Everything that the sections of a report are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steertune.recipes.ablation import analysis, charts, claims
from steertune.recipes.ablation.labels import arm_labels
from steertune.recipes.ablation.levels import arm_name
from steertune.recipes.ablation.looks import looks_of
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.tables import Claim, GridTables


@dataclass(frozen=True)
class Findings:
    """The findings from a grid's cells. Arms are named by their labels throughout.

    Attributes:
        grid: The `grid.json`.
        claim: The claim, or the same comparison on another measure.
        cells: All cells, failed ones too.
        paired: The cells that ran, with tasks made of the same rows merged, for comparisons.
        shares: Shares of the gap that the claim is about.
        verdict: What the result says about the claim.
        curves: Every arm's curve against the curves of the claim's baseline and of the design's start.
        labels: Name of every arm -> its label, in the order of the grid.
        claimed: Whether this measure is the one that the claim is about.
    """

    grid: Mapping[str, Any]
    tables: GridTables
    claim: Claim
    cells: Frame
    paired: Frame
    shares: analysis.Attribution
    verdict: claims.Verdict
    curves: Mapping[str, list[analysis.Efficiency]]
    answer: list[str]
    labels: Mapping[str, str]
    claimed: bool

    @property
    def ran(self) -> Frame:
        """The cells that did not fail."""
        return self.cells[self.cells["status"] != "failed"]

    @property
    def colours(self) -> dict[str, Any]:
        """Colour of every arm, the same in all charts."""
        return charts.colours([*dict.fromkeys([*self.labels.values(), *self.cells["arm"]])])


def find(grid: Mapping[str, Any], tables: GridTables, claim: Claim, cells: Frame) -> Findings:
    """Compare the arms, decide the claim and attribute the gap. At least one cell must have run."""
    labels = arm_labels(tables, grid["arms"])
    claimed = tables.claim is not None and claim.column == tables.claim.column
    alpha = claim.alpha / max(1, len(looks_of(grid)))
    claim = claim.model_copy(update={"better": labels[claim.better], "than": labels[claim.than], "alpha": alpha})
    cells = cells.assign(arm=cells["arm"].replace(labels))
    paired = analysis.in_pairs(cells[cells["status"] != "failed"], tables.tasks)
    shares = analysis.attribution(paired, tables, claim.column, claim.factor, labels, claim.sample)
    planned = len({tuple(path.split("/")[1:4:2]) for path in grid["cells"]})  # pairs of task and seed
    targets = tables.matched.targets_of(claim.strength)
    verdict = claims.verdict(analysis.in_pairs(cells, tables.tasks), claim, shares, planned, targets)
    start = [arm_name(tables, tables.design.start)] if tables.design.start else []
    baselines = dict.fromkeys([claim.than, *(labels.get(arm, arm) for arm in start)])
    curves = {than: analysis.efficiency(paired, than, claim.column, claim.sample) for than in baselines}
    answer = claims.answer(paired, claim, verdict, shares, curves[claim.than], targets)
    return Findings(grid, tables, claim, cells, paired, shares, verdict, curves, answer, labels, claimed)
