"""A card is fixed before the first cell, and looking before seeds are added has its price."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_cells import BETTER, CLOSED, GRID, THAN, Made

from steertune.recipes.ablate import write_grid
from steertune.recipes.ablation.cells import cells_table
from steertune.recipes.ablation.findings import find
from steertune.recipes.ablation.grid import Grid, make_grid
from steertune.recipes.ablation.looks import fixed
from steertune.recipes.ablation.sections.verdict import verdict
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.pages import Text
from steertune.recipes.lab.rows import Record


def grid_of(**changes: Any) -> Grid:
    raw = tomllib.loads(GRID)
    for path, value in changes.items():
        table, _, key = path.rpartition("__")
        (raw[table] if table else raw)[key] = value
    return make_grid(raw)


def written(folder: Path, **changes: Any) -> dict[str, Any]:
    write_grid(folder, grid_of(**changes), ["made"])
    return json.loads((folder / "grid.json").read_text())


def run_one(folder: Path) -> None:
    """One cell runs."""
    cell = grid_of().cells()[0]
    (folder / cell.path).mkdir(parents=True)
    keys = {"arm": cell.arm.name, "task": cell.task.label, "examples": cell.examples, "seed": cell.seed}
    Record(keys, {}, {"key": cell.key, "status": "ok"}).write(folder / cell.path / "cell.json")


def test_a_card_may_change_until_a_cell_ran_and_not_after(tmp_path: Path) -> None:
    first = written(tmp_path)
    assert written(tmp_path, card__hypothesis="Another.")["card_key"] != first["card_key"]
    again = written(tmp_path)
    assert (again["card_key"], again["looks"]) == (first["card_key"], first["looks"]), "nothing was seen yet"
    run_one(tmp_path)
    assert written(tmp_path)["looks"] == first["looks"], "going on is no second look"
    for change in ({"card__hypothesis": "Another."}, {"claim__margin": 0.01}, {"claim__tasks": "fixed"}):
        with pytest.raises(ArmError, match=r"fixed before the first cell ran.*Set them back, or"):
            fixed(grid_of(**change), tmp_path)
        with pytest.raises(ArmError, match="a claim that is made after looking"):
            written(tmp_path, **change)
    assert json.loads((tmp_path / "grid.json").read_text())["card_key"] == first["card_key"]


def test_a_folder_with_cells_and_without_the_card_they_ran_for_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    run_one(tmp_path)
    (tmp_path / "grid.json").unlink()
    with pytest.raises(ArmError, match=r"holds cells but no grid.json.*Put the file back, or choose another --folder"):
        fixed(grid_of(), tmp_path)


@pytest.mark.parametrize(
    ("taken", "side"), [((BETTER, THAN), "undecided"), ((THAN,), "for"), ((BETTER, CLOSED), "for"), ((), "for")]
)
def test_a_claim_about_cells_that_ran_before_it_counts_for_nothing(taken: tuple[str, ...], side: str) -> None:
    """An arm that is taken over is a baseline that was known; with both arms the result was known."""
    made = Made(facts={arm: {"taken_over": True} for arm in taken})
    found = made.findings(lambda arm, task, seed, kl: [0.4 + 0.01 * task + 0.2 * (arm == BETTER)] * 9 + [0.5])
    assert found.verdict.side == side
    assert ("in 8 pairs both arms were taken from another grid" in found.answer[0]) == (side == "undecided")


def test_every_design_that_cells_ran_for_is_a_look(tmp_path: Path) -> None:
    written(tmp_path)
    assert len(written(tmp_path, seeds=[0, 1, 2])["looks"]) == 1, "no cell ran for the first"
    run_one(tmp_path)
    assert [look["seeds"] for look in written(tmp_path, seeds=[0, 1, 2, 3])["looks"]] == [[0, 1, 2], [0, 1, 2, 3]]
    assert len(written(tmp_path, seeds=[0, 1, 2, 3])["looks"]) == 2
    assert len(written(tmp_path, seeds=[0, 1])["looks"]) == 3, "dropping seeds is a choice, too"


def test_a_claim_is_decided_at_alpha_over_the_number_of_looks() -> None:
    def values(arm: str, task: int, seed: int, kl: float) -> list[float]:
        gain = [0.04, 0.1, 0.16, 0.22][task] if arm == BETTER else 0.0
        return [0.4 + gain + 0.001 * seed + 0.001 * row for row in range(10)]

    grid, records = Made().run(values)
    findings = Made().findings(values)
    p = float(findings.answer[0].partition("p = ")[2].partition(")")[0])
    assert 0.025 < p < 0.05 and findings.verdict.side == "for"
    content = {**grid.to_json(), "command": "made up"}
    design = {"tasks": ["a"], "examples": [8], "seeds": [0]}
    content["looks"] = [design, {**design, "seeds": [0, 1]}]
    assert grid.tables.claim is not None
    again = find(content, grid.tables, grid.tables.claim, cells_table(records))
    assert again.verdict.side == "undecided" and again.claim.alpha == 0.025
    page = "\n".join(block.markdown for block in verdict.make(again).blocks if isinstance(block, Text))
    assert "after cells had run (seeds 0; then seeds 0, 1). That is 2 looks" in page
    assert "decided at alpha = 0.05 / 2 = 0.025" in page


def test_cells_of_other_grids_are_counted_on_the_page() -> None:
    def page(facts: dict[str, Any]) -> str:
        made = Made(facts={BETTER: facts}).findings(lambda *cell: np.full(4, 0.5))
        return "\n".join(block.markdown for block in verdict.make(made).blocks if isinstance(block, Text))

    assert "8 of them were taken from other grids, which ran before this card" in page({"taken_over": True})
    assert "taken from other grids" not in page({})
