"""One page and one table from the cells of a grid; nothing is run again.

    python -m steertune.recipes.report runs/quick

Writes `report.html` (opens without a network), `report.md` with `charts/`, `report.json` (the verdict and the answer),
and `cells.parquet`, a row a cell. A folder that has only this table of its cells is read from it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from steertune.recipes.ablate import GRID
from steertune.recipes.ablation import analysis, sections
from steertune.recipes.ablation.cells import read_cells
from steertune.recipes.ablation.levels import arm_name
from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.store import Store
from steertune.recipes.ablation.tables import Card, Claim, GridTables, TaskTable
from steertune.recipes.lab import measures
from steertune.recipes.lab.command_line import Argument, Choice, Option, Result, command
from steertune.recipes.lab.files import ArmError, read_result, write_whole
from steertune.recipes.lab.observe import neutral_rows
from steertune.recipes.lab.page import html_page
from steertune.recipes.lab.paths import modules_in

NAMES = modules_in("recipes/lab/measures")
MEASURES = [*NAMES, *(f"matched_{name}" for name in NAMES)]
MEASURE = f"instead of the claim's measure: {', '.join(NAMES)}; matched_NAME is short for --strength matched"


@command
def main(
    folder: Annotated[Path, Argument(help="folder of a grid")],
    measure: Annotated[str | None, Choice(MEASURES, MEASURE, metavar="NAME")] = None,
    strength: Annotated[
        str | None, Choice(["tuned", "matched"], "where it is read, instead of the claim's strength")
    ] = None,
    output: Annotated[Path | None, Option(help="folder to write to (the grid's)")] = None,
) -> Result:
    """Write the report, and print its page."""
    page = write_report(folder, measure, output, strength)
    short = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    return Result(short, f"{page.read_text(encoding='utf-8')}\nThis page: {page.with_suffix('.html')}")


def write_report(
    folder: Path, measure: str | None = None, output: Path | None = None, strength: str | None = None
) -> Path:
    """Write the report of a grid's folder; return the Markdown page.

    Args:
        folder: Where the grid's cells are.
        measure: Look at this measure instead of the claim's; the page says that it is not what was claimed.
        output: Where to write; None: to the grid's folder, over an older report.
        strength: Where to look at it, "tuned" or "matched"; None: where the claim does.

    Raises:
        ArmError: the folder holds no grid or no cells.
    """
    file = folder / GRID
    if not file.is_file():
        raise ArmError(f"{folder} holds no grid ({GRID}). Run one: python -m steertune.recipes.ablate")
    grid = read_result(file, "Run the grid again: it writes this file anew, and keeps its cells.")
    tables = analysis.read_tables(grid)
    cells = read_cells(folder, grid)
    assert tables.card is not None and tables.claim is not None  # the runner refuses a grid without
    output = output or folder
    (output / "charts").mkdir(parents=True, exist_ok=True)
    Store(folder).pack()
    claim = claim_about(tables.claim, measure, strength)
    ran = cells[cells["status"] != "failed"]
    lines = [f"# {tables.name}", "", *_card(tables.card, tables.claim, tables.tasks)]
    short = {
        "grid": tables.name,
        "measure": claim.measure,
        "strength": claim.strength,
        "cells": len(grid["cells"]),
        "ran": len(ran),
    }
    if ran.empty:
        lines += ["Every cell failed.", "", *sections.failures(cells)]
    else:
        found = _find(tables, claim, cells, ran, len({tuple(name.split("/")[1:4:2]) for name in grid["cells"]}))
        lines += _body(output, grid, tables, claim, cells, ran, found)
        claimed = tables.claim.column == claim.column
        short |= {"counts": _SIDES[found.said.side] if claimed else "not claimed", "answer": found.answer}
    page = output / "report.md"
    write_whole(page.with_suffix(".json"), json.dumps(short, indent=1))
    write_whole(page, "\n".join(lines) + "\n")
    write_whole(output / "report.html", html_page("\n".join(lines), output, tables.name))
    return page


def claim_about(claim: Claim, measure: str | None, strength: str | None) -> Claim:
    """The claim, or the same comparison on another measure.

    Raises:
        ArmError: there is no such measure.
    """
    name = measure or claim.measure
    if name.startswith("matched_"):  # how it was written before
        name, strength = name.removeprefix("matched_"), strength or "matched"
    return claim.model_copy(update={"measure": measures.get(name).name, "strength": strength or claim.strength})


@dataclass(frozen=True)
class _Found:
    """What the cells say.

    Attributes:
        paired: The cells for whatever compares; means and costs are by task and seed.
        shares: Of the gap that the claim is about.
        said: The verdict.
        curves: Every arm's against that of the claim's baseline, and of the design's start.
        answer: Three sentences.
    """

    paired: Frame
    shares: analysis.Attribution
    said: analysis.Verdict
    curves: dict[str, list[analysis.Efficiency]]
    answer: list[str]


def _find(tables: GridTables, claim: Claim, cells: Frame, ran: Frame, planned: int) -> _Found:
    """`planned`: pairs of task and seed that the grid has."""
    paired = analysis.in_pairs(ran, tables.tasks)
    shares = analysis.attribution(paired, tables, claim.column, claim.factor)
    said = analysis.verdict(analysis.in_pairs(cells, tables.tasks), claim, shares, planned)
    start = [arm_name(tables, tables.design.start)] if tables.design.start else []
    baselines = dict.fromkeys([claim.than, *start])
    curves = {than: analysis.efficiency(paired, than, claim.column) for than in baselines}
    return _Found(paired, shares, said, curves, analysis.answer(paired, claim, said, shares, curves[claim.than]))


def _body(
    folder: Path, grid: dict[str, Any], tables: GridTables, claim: Claim, cells: Frame, ran: Frame, found: _Found
) -> list[str]:
    label, paired = claim.label, found.paired
    crossed = [arm["name"] for arm in grid["arms"] if arm["levels"]]
    several = ran["examples"].nunique() > 1
    return [
        *_headline(tables, claim, found.said),
        *(f"{sentence}  " for sentence in found.answer),
        "",
        *_extent(grid, tables, claim, cells),
        *(sections.attribution(folder, tables, found.shares, label) if found.shares.shares else []),
        *sections.effects_of_factors(folder, paired[paired["arm"].isin(crossed)], tables, claim.column, label),
        f"## Arms against {claim.than}",
        "",
        *sections.comparisons(paired, claim),
        *(sections.recovered(paired, claim) if claim.recovers is not None else []),
        *sections.behaviour(ran),
        *(sections.efficiency(folder, paired, found.curves, claim, label) if several else []),
        *sections.side_effects(folder, ran, tables),
        *sections.cost(ran),
        *sections.failures(cells),
        *sections.how(grid, tables, ran),
    ]


def _headline(tables: GridTables, claim: Claim, said: analysis.Verdict) -> list[str]:
    if tables.claim is not None and claim.column != tables.claim.column:
        return [
            f"## A look at another measure: {claim.label}",
            "",
            f"The claim is about {tables.claim.label}; what follows was not claimed before the "
            "cells were run, and counts neither for nor against the hypothesis.",
            "",
        ]
    return [f"## The result counts {_SIDES[said.side]} the hypothesis", ""]


def _extent(grid: dict[str, Any], tables: GridTables, claim: Claim, cells: Frame) -> list[str]:
    """How much there is, and how far it reaches."""
    done = len(cells) - int((cells["status"] == "failed").sum())
    sizes = sorted(int(n) for n in cells["examples"].unique())
    means = f"Scores are means over n = {', '.join(map(str, sizes))}. " if len(sizes) > 1 else ""
    return [
        f"{done} of {len(grid['cells'])} cells, {cells['task'].nunique()} tasks, {cells['seed'].nunique()} seeds. "
        f"{means}Differences are paired by task and seed. All seeds of a task share its test rows, so nothing is "
        "called clear unless both a permutation test over the pairs and the test for other seeds *and* test rows, "
        f"corrected by Holm within their table, are below {claim.alpha:.0%}. Both are about these tasks and the "
        "settings that the tuning chose, not about others; *other tasks too* takes the tasks as a sample of many "
        f"like them, and nothing is called clear by it. {_measured(tables, claim)}{' '.join(grid['notes'])}",
        "",
    ]


def _measured(tables: GridTables, claim: Claim) -> str:
    """What the measure of the claim is not."""
    if claim.measure != "accuracy":
        return ""
    matched = f" The KL was matched on {_neutral(tables)} alone." if claim.strength == "matched" else ""
    return (
        "Pair accuracy is how often the model finds the chosen one of two given answers likelier; what it writes by "
        f"itself is another question (`--measure behaviour`, where answers were generated).{matched} "
    )


def _neutral(tables: GridTables) -> str:
    """The text on which the KL to the base was measured."""
    return f"{len(neutral_rows())} neutral rows" if tables.neutral is None else f"the rows of {tables.neutral}"


_SIDES = {"for": "for", "against": "against", "undecided": "neither for nor against"}


def _claim(claim: Claim) -> str:
    if claim.recovers is not None:
        return (
            f"`{claim.better}` has at least {claim.recovers:g} of `{claim.than}`'s gain over the base model in "
            f"{claim.label} (alpha = {claim.alpha:g}); against it counts if it clearly has less."
        )
    by = f", by more than {claim.margin:g}" if claim.margin else ""
    text = f"`{claim.better}` has more {claim.label} than `{claim.than}`{by}"
    if claim.factor:
        text += f", and {claim.factor}'s share of the gap is the largest"
    less = f"the difference is clearly below {claim.margin:g}" if claim.margin else "it clearly has less"
    other = f", or if another factor's share is clearly larger than {claim.factor}'s" if claim.factor else ""
    return f"{text} (alpha = {claim.alpha:g}); against it counts if {less}{other}."


def _instructions(entries: Sequence[str | TaskTable]) -> list[str]:
    """What prompting arms could say, and who wrote it."""
    told = [entry for entry in entries if isinstance(entry, TaskTable) and entry.instructions]
    lines = [f"- `{t.called}`: {t.instructions_by} {' · '.join(f'“{text}”' for text in t.instructions)}" for t in told]
    return ["**Instructions of prompting arms**, of which the tuning chose one.", "", *lines, ""] if told else []


def _card(card: Card, claim: Claim, tasks: Sequence[str | TaskTable]) -> list[str]:
    return [
        "## Card",
        "",
        f"**Problem.** {card.problem}",
        "",
        f"**Hypothesis.** {card.hypothesis}",
        "",
        f"**What would count against it.** {card.against}",
        "",
        f"**Claim, as it is decided.** {_claim(claim)}",
        "",
        f"**Baselines.** {card.baselines}",
        "",
        "**What each arm may use.**",
        "",
        *(f"- `{arm}`: {text}" for arm, text in card.affordances.items()),
        *([f"- *Unequal tuning budgets*: {card.unequal_budgets}"] if card.unequal_budgets else []),
        "",
        *_instructions(tasks),
    ]


if __name__ == "__main__":
    sys.exit(main())
