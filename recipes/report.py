"""Write one page and one table from the cells of a grid, without running anything again.

    steertune report runs/quick

Writes `report.html` (opens without a network), `report.md`, `report.json` (the verdict and the answer), `charts/` (PNG
and SVG), `tables/` (LaTeX), and `cells.parquet`, the rows of all cells. If a folder has only this table, the report is
written from it. The sections of the page are the files of `ablation/sections/`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

from steertune.recipes.ablate import GRID
from steertune.recipes.ablation.cells import read_cells
from steertune.recipes.ablation.findings import find
from steertune.recipes.ablation.sections import sections
from steertune.recipes.ablation.sections.card import card_blocks
from steertune.recipes.ablation.sections.failures import failed_cells
from steertune.recipes.ablation.sections.verdict import SIDES
from steertune.recipes.ablation.store import Store
from steertune.recipes.ablation.tables import Claim, read_tables
from steertune.recipes.lab import measures
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.files import ArmError, read_result, write_whole
from steertune.recipes.lab.options import Argument, Choice, Option
from steertune.recipes.lab.pages import Page, Section, Text, write_page
from steertune.recipes.lab.paths import modules_in

NAMES = modules_in("recipes/lab/measures")
MEASURES = [*NAMES, *(f"matched_{name}" for name in NAMES)]
MEASURE = f"measure to use instead of the claim's: {', '.join(NAMES)}; matched_NAME is short for --strength matched"


@command
def main(
    folder: Annotated[Path, Argument(help="folder of a grid")],
    measure: Annotated[str | None, Choice(MEASURES, MEASURE, metavar="NAME")] = None,
    strength: Annotated[
        str | None, Choice(["tuned", "matched", "frontier"], "strength to use instead of the claim's")
    ] = None,
    output: Annotated[Path | None, Option(help="folder to write to (the grid's)")] = None,
) -> Result:
    """Write the report, and print its page."""
    page = write_report(folder, measure, output, strength)
    summary = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    return Result(summary, f"{page.read_text(encoding='utf-8')}\nThis page: {page.with_suffix('.html')}")


def write_report(
    folder: Path, measure: str | None = None, output: Path | None = None, strength: str | None = None
) -> Path:
    """Write the report of a grid's folder; return the Markdown page. If `measure` or `strength` differs from the
    claim's, the page says that this is not what was claimed.

    Raises:
        ArmError: the folder holds no grid or no cells.
    """
    file = folder / GRID
    if not file.is_file():
        raise ArmError(f"{folder} holds no grid ({GRID}). Run one: steertune ablate GRID --folder {folder}")
    grid = read_result(file, "Run the grid again: it writes this file again and keeps the cells.")
    tables = read_tables(grid)
    assert tables.claim is not None  # reading a grid refuses one without a claim
    cells = read_cells(folder, grid)
    claim = claim_about(tables.claim, measure, strength)
    output = output or folder
    output.mkdir(parents=True, exist_ok=True)
    Store(folder).pack()
    ran = int((cells["status"] != "failed").sum())
    summary: dict[str, Any] = {
        "grid": tables.name,
        "measure": claim.measure,
        "strength": claim.strength,
        "cells": len(grid["cells"]),
        "ran": ran,
    }
    if ran:
        findings = find(grid, tables, claim, cells)
        counts = SIDES[findings.verdict.side] if findings.claimed else "not claimed"
        summary |= {"counts": counts, "answer": findings.answer}
        page = Page(tables.name, sections(findings))
    else:
        assert tables.card is not None
        card = Section("Card", card_blocks(tables.card, tables.claim, tables.tasks))
        page = Page(tables.name, [Section("", [Text("Every cell failed.")]), failed_cells(cells), card])
    write_whole(output / "report.json", json.dumps(summary, indent=1))
    return write_page(page, output, "report")


def claim_about(claim: Claim, measure: str | None, strength: str | None) -> Claim:
    """The claim, or the same comparison on another measure.

    Raises:
        ArmError: an unknown measure.
    """
    name = measure or claim.measure
    if name.startswith("matched_"):  # the former spelling
        name, strength = name.removeprefix("matched_"), strength or "matched"
    return claim.model_copy(update={"measure": measures.get(name).name, "strength": strength or claim.strength})


if __name__ == "__main__":
    sys.exit(main())
