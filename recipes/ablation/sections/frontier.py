"""What every arm reaches at each KL to the base, from one training."""

from __future__ import annotations

from collections.abc import Sequence

from steertune.recipes.ablation import analysis, charts
from steertune.recipes.ablation.cells import column
from steertune.recipes.ablation.findings import Findings
from steertune.recipes.ablation.sections import COMPARED, numbers, reach, section
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.strengths import EXTRAPOLATED, SHORT, TRAINED, marks
from steertune.recipes.ablation.tables import measure_label
from steertune.recipes.lab.pages import Block, Figure, Section, Table, Text, table_of
from steertune.recipes.lab.pages.measured import title
from steertune.recipes.lab.rows import FRONTIER, TUNED, at_kl

_SHOWN = ("behaviour", "accuracy_equal_length", "margin_per_token", "perplexity_ratio")


@section(place=5)
def frontier(findings: Findings) -> Section | None:
    """Effect against KL: a curve for every arm with a strength, a point for every other."""
    cells, claim = findings.ran, findings.claim
    targets = findings.tables.matched.frontier
    if len(targets) < 2 or "frontier" not in cells:
        return None
    names = [name for name in dict.fromkeys([claim.measure, *_SHOWN]) if cells[column(name, FRONTIER)].notna().any()]
    if not names:
        return None
    drawing = charts.frontiers(
        cells, targets, {name: title(name) for name in names[:2] + names[-1:]}, findings.colours
    )
    blocks: list[Block] = [
        Text(
            "From one training, every arm is brought to each KL to the base on the rows for matching. The mean over "
            "log KL is the figure to compare; each point counts in it by how far the KLs beside it are. "
            f"{SHORT}: the arm stops short of this KL in some cell, and counts with its last point. {EXTRAPOLATED}: a "
            f"trained arm at strengths outside {TRAINED[0]:g} to {TRAINED[1]:g}, which wins no claim there. Arms "
            "without a strength are points."
        ),
        Figure(drawing, "frontier", "Effect against the KL to the base, by arm"),
    ]
    for name in names:
        blocks += [Text(f"**{title(name)[0].upper()}{title(name)[1:]}**"), _by_kl(cells, name, targets)]
    return Section("Frontier", [*blocks, *_falls(cells), *_areas(findings)])


def _by_kl(cells: Frame, measure: str, targets: Sequence[float]) -> Table:
    """Means of a measure: a row for every arm, a column for every KL, and the mean over log KL."""
    rows = []
    for arm, of_arm in cells.groupby("arm", sort=False):
        area = of_arm[column(measure, FRONTIER)]
        if area.notna().any():
            at = [_marked(of_arm, measure, kl) for kl in targets]
            rows.append([str(arm), *at, f"{area.mean():.3f}{marks(of_arm, targets)}"])
        elif of_arm[column(measure, TUNED)].notna().any():
            kl = of_arm[column("kl", TUNED)].mean()
            point = f"{of_arm[column(measure, TUNED)].mean():.3f} at KL {kl:.2g}"
            rows.append([str(arm), *([""] * len(targets)), point])
    header = ["arm", *(f"KL {kl:g}" for kl in targets), "mean over log KL"]
    return table_of(header, rows, f"frontier_{measure}")


def _marked(cells: Frame, measure: str, kl: float) -> str:
    """The mean at a KL, with its marks."""
    name = column(measure, at_kl(kl))
    if name not in cells or cells[name].isna().all():
        return ""
    return f"{cells[name].mean():.3f}{marks(cells, [kl])}"


def _falls(cells: Frame) -> list[Block]:
    """Where the KL was seen to fall while the strength grew."""
    if "kl_falls" not in cells:
        return []
    arms = cells[cells["kl_falls"] == True]["arm"].value_counts()  # noqa: E712  None: a cell that did not run
    if arms.empty:
        return []
    text = ", ".join(f"{arm} ({count})" for arm, count in arms.items())
    return [Text(f"The KL fell while the strength grew, beyond the strengths that are used here, in cells of {text}.")]


def _areas(findings: Findings) -> list[Block]:
    """The mean over log KL of every arm against the claim's baseline."""
    claim, cells = findings.claim, findings.paired
    name = column(claim.measure, FRONTIER)
    if claim.than not in analysis.scores(cells, name):
        return []
    gaps = sorted(
        analysis.comparisons(cells, claim.than, name, claim.sample), key=lambda gap: -gap.difference.estimate
    )
    targets = findings.tables.matched.frontier
    rows = [
        [gap.arm, f"{gap.mean:.3f}{marks(cells[cells['arm'] == gap.arm], targets)}", *numbers(gap.difference)]
        for gap in gaps
    ]
    label = measure_label(claim.measure, FRONTIER)
    return [
        Text(f"{label[0].upper()}{label[1:]}, against {claim.than}:"),
        table_of(["arm", "mean over log KL", f"minus {claim.than}", *COMPARED], rows, "frontier"),
        *reach([gap.difference for gap in gaps]),
    ]
