"""Scores by number of examples, and how many examples of each baseline n examples of an arm are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from steertune.recipes.ablation import analysis, charts
from steertune.recipes.ablation.cells import column
from steertune.recipes.ablation.findings import Findings
from steertune.recipes.ablation.sections import COMPARED, numbers, p_text, reach, section
from steertune.recipes.ablation.statistics.paired import Difference
from steertune.recipes.lab import measures
from steertune.recipes.lab.pages import Block, Figure, Section, Text, table_of

_SHOWN = 8  # arms in a chart; more cannot be told apart


@section(place=50)
def efficiency(findings: Findings) -> Section | None:
    """Curves, where there are several numbers of examples."""
    ran, claim = findings.ran, findings.claim
    if ran["examples"].nunique() < 2:
        return None
    drawing = charts.curves(ran, most_telling(findings), claim.column, claim.label, findings.colours)
    blocks: list[Block] = [
        Figure(drawing, "curves", f"{claim.label} by number of examples"),
        Text(
            "Bars: 95 % over the seeds of a task, unpaired; the intervals of the tables are paired, and allow for "
            "other test rows. Dashed: the base model."
        ),
        *_side_effects(findings),
        *_by_examples(findings),
    ]
    for i, (than, curves) in enumerate(findings.curves.items()):
        blocks += _worth(findings, curves, than, f"worth_{i + 1}")
    return Section("Sample efficiency", blocks)


def _side_effects(findings: Findings) -> list[Block]:
    """Side effects of the arms of the curves, by number of examples."""
    ran, claim = findings.ran, findings.claim
    blocks: list[Block] = []
    for name in ("kl", "perplexity_ratio", "repetition", "neutral_repetition"):
        of_cells = column(name, claim.strength)
        if ran[of_cells].notna().any() and name != claim.measure:
            label = measures.get(name).heading
            drawing = charts.curves(ran, most_telling(findings), of_cells, label, findings.colours)
            blocks.append(Figure(drawing, f"curves_{name}", f"{label} by number of examples"))
    return blocks


def most_telling(findings: Findings) -> list[str]:
    """The arms of the claim and the best others, as many as a chart can show."""
    claim = findings.claim
    means = findings.paired.groupby("arm")[claim.column].mean().dropna().sort_values(ascending=False)
    first = [arm for arm in (claim.better, claim.than) if arm in means.index]
    return [*first, *(str(arm) for arm in means.index if arm not in first)][:_SHOWN]


def _by_examples(findings: Findings) -> list[Block]:
    claim = findings.claim
    arms = analysis.by_examples(findings.paired, claim.than, claim.column, claim.sample)
    sizes = sorted({n for by_size in arms.values() for n in by_size})

    def cell(by_size: Mapping[int, tuple[float, Difference | None]], n: int) -> str:
        if n not in by_size:
            return ""
        mean, gap = by_size[n]
        return f"{mean:.3f}" if gap is None else f"{mean:.3f} ({gap}, p {p_text(gap.p)})"

    rows = [[arm, *(cell(by_size, n) for n in sizes)] for arm, by_size in arms.items()]
    return [
        Text(
            f"Mean at every n (and minus {claim.than} with as many, 95 % for other "
            f"{'tasks' if claim.sample else 'seeds and test rows'}, p by Holm over the table):"
        ),
        table_of(["arm", *(f"n = {n}" for n in sizes)], rows, "by_examples"),
        *reach([gap for by_size in arms.values() for _, gap in by_size.values() if gap is not None]),
    ]


def _worth(findings: Findings, curves: Sequence[analysis.Efficiency], than: str, name: str) -> list[Block]:
    """How many examples of one baseline n examples of every arm are worth."""
    if not curves:
        return [Text(f"No arm has its whole curve beside that of {than} in any pair.")]
    sizes = list(curves[0].equivalents)
    header = ["arm", f"area over {than}'s curve", *COMPARED, *(f"n = {n} is worth" for n in sizes)]
    rows = [[e.arm, *numbers(e.area), *(str(e.equivalents[n]) for n in sizes)] for e in curves]
    absent = [arm for arm in dict.fromkeys(findings.paired["arm"]) if arm not in {than, *(e.arm for e in curves)}]
    note = f"Left out, because no pair has the whole curve of them: {', '.join(absent)}."
    return [
        Text(
            f"*n is worth*: how many examples {than} needs to reach what the arm reaches with n, with its 95 % "
            "interval for other seeds and test rows; `>` where its curve never gets there."
        ),
        table_of(header, rows, name),
        *reach([e.area for e in curves]),
        *([Text(note)] if absent else []),
    ]
