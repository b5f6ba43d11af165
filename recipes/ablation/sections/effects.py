"""The effect of changing one factor, everything else equal."""

from __future__ import annotations

from collections.abc import Sequence

from steertune.recipes.ablation import charts
from steertune.recipes.ablation.findings import Findings
from steertune.recipes.ablation.labels import combination_label, in_words
from steertune.recipes.ablation.levels import INERT
from steertune.recipes.ablation.sections import COMPARED, numbers, p_text, reach, section
from steertune.recipes.ablation.statistics import Frame, factorial
from steertune.recipes.lab.pages import Block, Figure, Section, Text, table_of

_HEADER = ["factor", "level against reference", "difference", *COMPARED, "contexts"]


@section(place=20)
def effects(findings: Findings) -> Section | None:
    """Matched comparisons, analysis of variance, mixed model."""
    factors, measure, sample = [*findings.tables.factors], findings.claim.column, findings.claim.sample
    crossed = [findings.labels[arm["name"]] for arm in findings.grid["arms"] if arm["levels"]]
    cells = findings.paired[findings.paired["arm"].isin(crossed)]
    if not factors or cells.empty:
        return None
    # a factor that means nothing in an arm counts as at the design's centre, or the arm would be compared with no
    # other
    centre = findings.tables.design.around or findings.tables.design.start
    cells = cells.dropna(subset=[measure])
    inert = {f: centre[f] for f in factors if centre and f in cells and (cells[f] == INERT).any()}
    cells = cells.replace({f: {INERT: level} for f, level in inert.items()})
    matched = factorial.effects(cells, factors, measure, sample)
    if not matched:
        return None
    drawing = charts.intervals(
        {f"{effect.factor}: {_levels(effect)}": effect.difference.shown for effect in matched},
        f"difference in {findings.claim.label}",
    )
    note = f"Where a factor means nothing in an arm, it counts as {combination_label(inert)}."
    blocks: list[Block] = [
        Figure(drawing, "effects", "Difference that every level makes"),
        table_of(_HEADER, _rows(matched), "effects"),
        *reach([effect.difference for effect in matched]),
        *([Text(note)] if inert else []),
        *_changes(cells, factors, measure, sample),
        # both assume that an effect is the same in every task, so they do not extend to other tasks
        *([] if sample else [*_variance(cells, factors, measure), *_mixed_model(cells, factors, measure)]),
    ]
    return Section("Effect of each factor, everything else equal", blocks)


def _levels(effect: factorial.Effect) -> str:
    return in_words(f"{effect.level} − {effect.reference}")


def _rows(effects: Sequence[factorial.Effect]) -> list[list[str]]:
    rows = []
    for effect in effects:
        rows.append([effect.factor, _levels(effect), *numbers(effect.difference), str(effect.contexts)])
    return rows


def _changes(cells: Frame, factors: Sequence[str], measure: str, sample: bool) -> list[Block]:
    """The interaction of every factor with the number of examples."""
    if cells["examples"].nunique() < 2:
        return []
    changes = factorial.changes(cells, factors, measure, sample)
    if not changes:
        return []
    sizes = f"{cells['examples'].max()} examples than with {cells['examples'].min()}"
    return [Text(f"How much larger the effect is with {sizes}:"), table_of(_HEADER, _rows(changes), "changes")]


def _variance(cells: Frame, factors: Sequence[str], measure: str) -> list[Block]:
    variance = factorial.anova(cells, factors, measure)
    if variance is None:
        return []
    rows = [
        [str(term), f"{row.df:.0f}", f"{row.F:.2f}", p_text(row.p), f"{row.share:.2f}"]
        for term, row in variance.iterrows()
    ]
    return [
        Text(
            "Analysis of variance with HC3 errors, tasks and seeds as blocks. Its p values, like those of the mixed "
            "model below, are uncorrected, about these test rows, and too small where an effect differs from pair to "
            "pair; nothing is claimed from them. With several numbers of examples, both use the mean."
        ),
        table_of(["term", "df", "F", "p", "partial η²"], rows, "anova"),
    ]


def _mixed_model(cells: Frame, factors: Sequence[str], measure: str) -> list[Block]:
    mixed = factorial.mixed_model(cells, factors, measure)
    if mixed is None:
        return []
    rows = [
        [in_words(str(level)), f"{row.estimate:+.3f}", f"[{row.low:+.3f}, {row.high:+.3f}]", p_text(row.p)]
        for level, row in mixed.iterrows()
    ]
    return [
        Text("Mixed model, task and seed as random effects:"),
        table_of(["level", "estimate", "95 %", "p"], rows, "mixed_model"),
    ]
