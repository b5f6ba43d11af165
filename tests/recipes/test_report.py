"""The report on cells that were made up, so that what it should say is known."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgba_array
from matplotlib.figure import Figure

from steertune.recipes import report
from steertune.recipes.ablate import GRID, write_grid
from steertune.recipes.ablation import charts
from steertune.recipes.ablation.analysis import attribution, by_examples, comparisons, in_pairs, scores
from steertune.recipes.ablation.cells import column, read_cells
from steertune.recipes.ablation.claims import recovered, verdict
from steertune.recipes.ablation.findings import find
from steertune.recipes.ablation.grid import Cell, Grid, make_grid
from steertune.recipes.ablation.labels import arm_labels
from steertune.recipes.ablation.levels import named
from steertune.recipes.ablation.sections import sections
from steertune.recipes.ablation.statistics.paired import crossed_interval, difference
from steertune.recipes.ablation.statistics.rows import examples_of, rows_of, with_base
from steertune.recipes.ablation.tables import GridTables, TaskTable, read_tables
from steertune.recipes.lab import measures, pages
from steertune.recipes.lab.files import ArmError, read_result, write_result
from steertune.recipes.lab.rows import BASE, COLUMNS, MATCHED, TUNED, Record

TABLES = """
name = "made_up"
base = "vector_dpo"
arms = ["full_dpo"]
tasks = ["warm_tone", "cautious_advice"]
examples = [4, 16, 64]
seeds = [0, 1, 2, 3, 4, 5]

[card]
problem = "Does the form matter?"
hypothesis = "The vector is more accurate at the same KL."
against = "LoRA is as accurate."
baselines = "LoRA and full finetuning."
[card.affordances]
"*" = "the same pairs"

[claim]
better = "form=bias,contrast=pairs"
than = "form=lora,contrast=none"
measure = "accuracy"
strength = "matched"
tasks = "fixed"

[design]
kind = "full"
start = { form = "lora", contrast = "none" }
end = { form = "bias", contrast = "pairs" }

[factors.form]
lora = { adapter = { type = "lora", r = 8, target_modules = "all-linear" } }
bias = {}

[factors.contrast]
none = { loss.contrast = "none" }
pairs = {}
"""
ROWS = 40
Score = Callable[[Cell], float]


def by_form(cell: Cell, gain: float = 0.1) -> float:
    """The form is worth `gain`, the contrast nothing, every doubling of the examples 0.02."""
    levels = cell.arm.levels or {}
    return 0.55 + gain * (levels.get("form") == "bias") + 0.02 * np.log2(cell.examples)


BASE_MARGINS = [1.0, -1.0] * (ROWS // 2)
NEUTRAL = {"neutral_kl": [0.1], "neutral_nll": [math.log(6.0)], "neutral_tokens": [1]}


def observed(margins: Sequence[float], score: float) -> dict[str, list[Any]]:
    """What was seen of a model with these margins, whose four answers have this score and repeat nothing."""
    return {"margin": [*map(float, margins)], "score": [score] * 4, "answer": ["one two three four"] * 4}


def change(folder: Path, edit: Callable[[Record], None]) -> None:
    """Edit every cell of a folder."""
    for file in sorted(folder.rglob("cell.json")):
        record = Record.read(file)
        edit(record)
        record.write(file)


def cells_of(folder: Path) -> pd.DataFrame:
    """The cells with the levels of their arms."""
    return read_cells(folder, read_result(folder / GRID, ""))


def make_up(folder: Path, score: Score, seed: int = 0, keep: Callable[[Cell], bool] = lambda cell: True) -> Grid:
    """Cells whose accuracy is `score` up to a little noise of their seed and of their own."""
    grid = make_grid(tomllib.loads(TABLES))
    write_grid(folder, grid, ["made_up", "--data-root", "/somewhere"])
    for cell in filter(keep, grid.cells()):
        rng = np.random.default_rng([seed, cell.seed, cell.examples, *map(ord, cell.task.label + cell.arm.name)])
        shared = np.random.default_rng([seed, cell.seed, len(cell.task.label)]).normal(0, 0.05)
        # the same rows are hard for all cells, about
        hard = np.random.default_rng(len(cell.task.label)).permutation(ROWS) + rng.normal(0, 2, ROWS)
        right = hard.argsort().argsort() < ROWS * np.clip(score(cell) + shared + rng.normal(0, 0.02), 0, 1)
        arm = observed(np.where(right, 1.0, -1.0), 0.6)
        observations = {
            BASE: {**observed(BASE_MARGINS, 0.5), "neutral_nll": [math.log(5.5)], "neutral_tokens": [1]},
            TUNED: {**arm, **NEUTRAL},
        }
        scalable = cell.arm.levels is not None  # full finetuning has no strength
        if scalable:
            observations[MATCHED] = arm
        keys = {"arm": cell.arm.name, "task": cell.task.label, "examples": cell.examples, "seed": cell.seed}
        facts = {
            "key": cell.key, "status": "ok", "error": None, "scalable": scalable, "tuning": [], "parameters": 576,
            "setting": {"rate": 1.0, "steps": 16, "strength": 1.0}, "train_seconds": 1.0, "tuning_seconds": 2.0,
            "pairs_read": 64, "tokens_read": 999, "peak_memory_gb": 1.0,
        }  # fmt: skip
        file = folder / cell.path / "cell.json"
        file.parent.mkdir(parents=True)
        Record(keys, observations, facts).write(file)
    return grid


@pytest.fixture(autouse=True)
def pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a report's time, so figures are drawn for tests of figures only (`drawn`)."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: Path(file).write_bytes(b"not drawn"))


@pytest.fixture
def drawn() -> None:
    """Asks for figures that are drawn."""


def said(folder: Path) -> str:
    return report.write_report(folder).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("gain", "side", "words"),
    [
        (0.15, "for the hypothesis", ", more."),
        (-0.15, "against the hypothesis", ", less."),
        (0.0, "neither for nor against the hypothesis", "neither clearly more nor clearly less than claimed"),
    ],
)
def test_the_verdict_is_that_of_the_numbers(gain, side, words, tmp_path):
    grid = make_up(tmp_path, lambda cell: by_form(cell, gain))
    page = said(tmp_path)
    assert f"## The result counts {side}" in page
    assert words in page
    cells = cells_of(tmp_path)
    claim = grid.tables.claim
    cells = cells.sort_values(["task", "examples", "seed", "arm"])
    right = np.stack(cells["accuracy@matched by example"][cells["arm"].isin([claim.better, claim.than])])
    by_pair = right.reshape(2, 3, 6, 2, ROWS).mean(axis=1)  # task, examples, seed, arm (better first), row
    expected = crossed_interval(*(by_pair[:, :, 0] - by_pair[:, :, 1]))
    assert str(expected) in verdict(cells, claim).sentence and str(expected) in page
    assert "LoRA is as accurate." in page


@pytest.mark.parametrize(
    ("gain", "changes", "side", "words"),
    [
        (0.15, {"factor": "form"}, "for", "and form's share is the largest"),
        (0.15, {"factor": "contrast"}, "against", "the share of form is larger than that of contrast"),
        (0.0, {"margin": 0.1}, "against", "below the smallest difference that would matter (0.1)"),
        (0.0, {"margin": 0.001}, "undecided", "neither clearly more nor clearly less than claimed"),
        (0.15, {"margin": 0.05}, "for", "more than 0.05"),
        (0.06, {"margin": 0.05}, "undecided", "neither clearly more nor clearly less than claimed"),
    ],
)
def test_every_clause_of_the_claim_is_decided(gain, changes, side, words, tmp_path):
    grid = make_up(tmp_path, lambda cell: by_form(cell, gain))
    claim = grid.tables.claim.model_copy(update=changes)
    cells = cells_of(tmp_path)
    found = verdict(cells, claim, attribution(cells, grid.tables, claim.column, claim.factor))
    assert (found.side, words in found.sentence) == (side, True), found.sentence


@pytest.mark.parametrize(("own", "side"), [(0.85, "for"), (0.6, "against"), (0.775, "undecided"), (0.4, "against")])
def test_a_share_of_a_gain_over_the_base_model_is_decided(own, side, tmp_path):
    """The base has 0.5, `than` 0.8, so 0.9 of its gain is 0.27."""
    grid = make_up(tmp_path, lambda cell: 0.5)
    claim = grid.tables.claim.model_copy(update={"recovers": 0.9})
    cells = cells_of(tmp_path)
    reached = cells["arm"].map({claim.better: own, claim.than: 0.8}).fillna(0.5)
    noise = np.random.default_rng(0)
    for i in cells.index:  # which rows are right is chance, how many is not
        right = noise.permutation(np.arange(ROWS) < round(ROWS * reached[i])).astype(float)
        cells.at[i, "accuracy@matched by example"], cells.at[i, "accuracy@matched"] = right, right.mean()
    found = verdict(cells, claim)
    assert found.side == side, found.sentence
    # what failed elsewhere, before its base was measured, is nobody's
    failed = pd.DataFrame([{**cells.iloc[0][["task", "seed", "examples"]], "arm": "other", "status": "failed"}])
    assert verdict(pd.concat([failed, cells], ignore_index=True), claim) == found
    table = {one.arm: one for one in recovered(cells, claim)}
    exact = {arm: round(ROWS * share) / ROWS - 0.5 for arm, share in ((claim.better, own), (claim.than, 0.8))}
    assert table[claim.better].share == pytest.approx(exact[claim.better] / exact[claim.than])
    assert table[claim.better].ahead.estimate == pytest.approx(exact[claim.better] - 0.9 * exact[claim.than])
    assert table[claim.than].share == pytest.approx(1)
    assert set(table) == set(cells["arm"])


def test_a_share_of_no_gain_is_nothing(tmp_path):
    """`than` is worse than the base, `better` less so."""
    grid = make_up(tmp_path, lambda cell: 0.5)
    claim = grid.tables.claim.model_copy(update={"recovers": 0.9})
    cells = cells_of(tmp_path)
    right = cells["arm"].map({claim.better: 0.5, claim.than: 0.3}).fillna(0.5)
    for name, shares in (("accuracy@matched", right), ("accuracy@0", right * 0 + 0.6)):
        cells[name] = shares
        cells[examples_of(name)] = [(np.arange(ROWS) < ROWS * share).astype(float) for share in shares]
    found = verdict(cells, claim)
    assert found.side == "undecided" and "has no clear gain over the base" in found.sentence


def test_pairs_that_were_never_run_are_left_out_of_the_verdict(tmp_path):
    make_up(tmp_path, lambda cell: by_form(cell, 0.15), keep=lambda cell: cell.seed < 4)
    page = said(tmp_path)
    assert "8 of 12 pairs of task and seed, 4 left out: not run" in page
    assert "## The result counts neither for nor against" in page


def test_a_factor_that_means_nothing_in_an_arm_is_compared_at_the_design_s_centre(tmp_path):
    one = lambda cell: cell.arm.name != "form=lora,contrast=pairs"  # noqa: E731
    grid = make_up(tmp_path, lambda cell: by_form(cell, 0.15), keep=one)
    content = read_result(tmp_path / GRID, "")
    for arm in content["arms"]:
        if (arm["levels"] or {}).get("form") == "lora":
            arm["levels"]["contrast"] = "-"
    write_result(tmp_path / GRID, content)
    section = said(tmp_path).split("## Effect of each factor")[1].split("\n## ")[0]
    assert grid.tables.design.start["contrast"] == "none" and "it counts as no contrast" in section
    assert re.search(r"\| form \| vector − LoRA \| \+0\.1", section)


def test_learning_rates_at_the_edge_of_what_was_tried_are_named(tmp_path):
    make_up(tmp_path, by_form)
    page = said(tmp_path)
    assert "Learning rates that were tried" in page and "Of 5 trained arms" in page


def test_a_claim_of_a_share_has_its_section(tmp_path):
    make_up(tmp_path, lambda cell: by_form(cell, 0.15))
    grid = read_result(tmp_path / GRID, "")
    grid["tables"]["claim"]["recovers"] = 0.9
    write_result(tmp_path / GRID, grid)
    page = said(tmp_path)
    assert "## Recovered of LoRA, no contrast's gain" in page
    assert "gain over the base model" in page.split("## Card")[1]


def test_that_most_of_the_gap_is_one_factor_s_takes_every_mixture(tmp_path):
    grid = make_up(tmp_path, by_form, keep=lambda cell: cell.arm.name != "form=lora,contrast=pairs")
    claim = grid.tables.claim.model_copy(update={"factor": "form"})
    cells = cells_of(tmp_path)
    found = attribution(cells, grid.tables, claim.column, "form")
    assert not found.shares and "form=lora,contrast=pairs" in found.why
    assert verdict(cells, claim, found).side == "undecided"
    assert "Shares of the gap are not computed: no pair of task and seed has every mixture; *LoRA, pairs*" in said(
        tmp_path
    )


def test_a_gain_on_these_test_rows_only_is_no_gain(tmp_path):
    """Every seed gains by the same few rows: sure for these rows, chance for others."""
    grid = make_up(tmp_path, lambda cell: 0.5)

    def add_luck(record: Record) -> None:
        if "form=bias" in record.keys["arm"]:
            record.observations[MATCHED]["margin"][:2] = [1.0, 1.0]

    change(tmp_path, add_luck)
    cells, claim = cells_of(tmp_path), grid.tables.claim
    [against] = [c for c in comparisons(cells, claim.than, claim.column) if c.arm == claim.better]
    assert against.difference.interval.excludes_zero and against.difference.permutation < 0.05
    assert not against.difference.clear() and verdict(cells, claim).side == "undecided"


def test_another_measure_than_the_claim_s_is_no_verdict(tmp_path):
    make_up(tmp_path, lambda cell: by_form(cell, 0.15))
    page = report.write_report(tmp_path, strength="tuned").read_text(encoding="utf-8")
    assert "## A look at another measure" in page and "neither for nor against the hypothesis" in page
    assert "## The result counts" not in page


def test_another_folder_can_be_written_to(tmp_path):
    make_up(tmp_path / "grid", by_form, keep=lambda cell: cell.examples == 4)
    page = report.write_report(tmp_path / "grid")
    of_the_claim = page.read_text(encoding="utf-8")
    options = ["--strength", "tuned", "--output", str(tmp_path / "look" / "accuracy")]
    assert report.main([str(tmp_path / "grid"), *options]) == 0
    look = tmp_path / "look" / "accuracy"
    assert "## A look at another measure" in (look / "report.md").read_text(encoding="utf-8")
    assert (look / "charts" / "effects.png").is_file() and (look / "report.html").is_file()
    assert page.read_text(encoding="utf-8") == of_the_claim


def test_a_grid_of_which_only_the_table_was_kept_has_the_same_report(tmp_path, capsys):
    make_up(tmp_path, by_form)
    page = said(tmp_path)
    shutil.rmtree(tmp_path / "cells")
    assert said(tmp_path) == page
    (tmp_path / "cells.parquet").write_text("no table")
    assert report.main([str(tmp_path)]) == 2
    assert "is not a table of cells" in capsys.readouterr().err


def ends_in(header: list[str], title: str, row: list[str]) -> tuple[float, float]:
    """The ends of an interval in a row of a report's table; infinite where they are unknown."""
    text = row[header.index(title)]
    low, high = map(float, text.strip("[]").split(", ")) if text != "unknown" else (-np.inf, np.inf)
    return low, high


def tables_of(page: str) -> list[list[list[str]]]:
    """The tables of a page, each a list of rows."""
    found = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    # a "|" inside a cell is escaped
    return [
        [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
        for table in found
    ]


def test_the_effects_table_has_tasks_as_a_sample_beside_the_other_intervals(tmp_path):
    """Pairs help by 0.3 in one task and not at all in the other: surely in these two, and who knows in others."""
    make_up(tmp_path, lambda cell: 0.4 + 0.3 * ("contrast=pairs" in cell.arm.name and cell.task.label == "warm_tone"))
    header, _, *rows = next(table for table in tables_of(said(tmp_path)) if "level against reference" in table[0])
    row = next(row for row in rows if row[0] == "contrast")
    title = header.index("95 %, other tasks too")
    assert header[title : title + 4] == [
        "95 %, other tasks too",
        "95 %, other test rows too",
        "95 %, these test rows",
        "p (Holm)",
    ]
    assert ends_in(header, "95 %, other test rows too", row)[0] > 0.05
    by_task = cells_of(tmp_path).groupby(["task", "contrast"])["accuracy@matched"].mean().unstack("contrast")
    means = by_task["pairs"] - by_task["none"]
    reach = 12.706 * abs(means.iloc[0] - means.iloc[1]) / 2
    expected = (means.mean() - reach, means.mean() + reach)
    assert ends_in(header, "95 %, other tasks too", row) == pytest.approx(expected, abs=2e-3)


PUBLISHED = sorted((Path(report.__file__).parent.parent / "docs" / "results").rglob("report.md"))


@pytest.mark.parametrize("page", PUBLISHED, ids=lambda page: page.parent.name)
def test_no_published_page_has_python_in_its_prose(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"\{'|\b(?:True|False)\b", text.split("```")[0])


@pytest.mark.parametrize("page", PUBLISHED, ids=lambda page: page.parent.name)
def test_no_published_interval_is_narrower_than_one_that_allows_for_less(page):
    titles = ["95 %, these test rows", "95 %, other test rows too", "95 %, other tasks too"]
    compared = 0
    for header, _, *rows in tables_of(page.read_text(encoding="utf-8")):
        for row in rows:
            # one seed leaves what allows for other rows unknown, and what allows for other tasks known
            ends = [ends_in(header, title, row) for title in titles if title in header]
            known = [(low, high) for low, high in ends if math.isfinite(low)]
            for (low, high), (lower, higher) in itertools.pairwise(known):
                assert lower <= low and high <= higher, row
                compared += 1
    assert compared


def test_the_examples_of_every_measure_have_its_mean(tmp_path):
    make_up(tmp_path, by_form, keep=lambda cell: cell.examples == 4)
    change(tmp_path, lambda record: record.observations[TUNED].update(score=[0.5, None, 0.7]))
    cells = cells_of(tmp_path)
    for measure, strength in itertools.product(measures.names(), (BASE, TUNED, MATCHED)):
        name, total = column(measure, strength), measures.get(measure).total or float
        for value, rows in zip(cells[name], rows_of(cells, name), strict=True):
            assert (rows is None) == bool(np.isnan(value)), name
            assert rows is None or total(np.nanmean(rows)) == pytest.approx(value), name
            assert rows is None or len(rows) == ROWS or measure not in ("accuracy", "margin_gain", "moved_wrong")


def test_the_report_says_what_it_was_made_with(tmp_path):
    grid = make_up(tmp_path, by_form)

    def edit(record: Record) -> None:
        record.facts |= {"versions": f"torch {record.keys['seed'] % 2}", "scorer": "a rule"}
        record.observations[TUNED]["score"][0] = None

    change(tmp_path, edit)
    page = said(tmp_path)
    assert "- Made with torch 0." in page and "- Made with torch 1." in page
    assert "- Behaviour of warm_tone: a rule." in page
    assert f"{len(grid.cells())} judgements failed" in page


def test_the_attribution_names_the_factor_and_adds_up(tmp_path):
    make_up(tmp_path, by_form)
    page = said(tmp_path)
    assert re.search(r"clearly more or less than nothing comes from form \+0\.\d+", page)
    assert "nothing can be said of contrast" in page
    gap = float(re.search(r"shares of the gap \(([+-][\d.]+)\)", page)[1])
    shares = [float(x) for x in re.findall(r"^\| (?:form|contrast) \| ([+-][\d.]+) \|", page, re.MULTILINE)]
    assert len(shares) == 2 and sum(shares) == pytest.approx(gap, abs=2e-3)
    effect = re.search(r"\| form \| vector − LoRA \| ([+-][\d.]+) \|", page)
    assert float(effect[1]) == pytest.approx(0.1, abs=0.02)


def test_what_a_vector_with_four_examples_is_worth_in_loras(tmp_path):
    # LoRA gains 0.02 with every doubling, the vector is 0.06 ahead: three doublings
    make_up(tmp_path, lambda cell: by_form(cell, 0.06))
    row = re.search(r"\| vector, pairs \| .* \| (\d+) \[(\d+), > 64\] \| .* \| (.*) \|", said(tmp_path))
    estimate, low = map(int, row.groups()[:2])
    assert 24 <= estimate <= 40 and 8 <= low <= estimate
    assert row[3].startswith("> 64 ["), "64 examples of the vector are worth more than LoRA has in the grid"


def test_every_number_of_examples_has_its_means_and_its_differences(tmp_path):
    grid = make_up(tmp_path, lambda cell: by_form(cell, 0.06 * np.log2(cell.examples) / 6))
    page, claim = said(tmp_path), grid.tables.claim
    assert "Scores are means over n = 4, 16, 64." in page
    cells = cells_of(tmp_path)
    found = by_examples(cells, claim.than, claim.column)
    for n in (4, 16, 64):
        own = cells[cells["examples"] == n]
        wide = own.pivot_table(index=["task", "seed"], columns="arm", values=claim.column)
        value, gap = found[claim.better][n]
        assert value == pytest.approx(wide[claim.better].mean())
        assert gap.estimate == pytest.approx((wide[claim.better] - wide[claim.than]).mean())
        assert f"{value:.3f} ({gap}, p " in page
        assert found[claim.than][n] == (pytest.approx(wide[claim.than].mean()), None)
    assert "How much larger the effect is with 64 examples than with 4:" in page
    row = re.search(r"64 examples than with 4:.*?\| form \| vector − LoRA \| ([+-][\d.]+) \|", page, re.DOTALL)
    assert float(row[1]) == pytest.approx(0.04, abs=0.02)


def test_arms_are_measured_in_examples_of_the_claim_s_baseline_and_of_the_design_s_start(tmp_path):
    tables = tomllib.loads(TABLES)
    grid = make_up(tmp_path, by_form)
    found = read_result(tmp_path / GRID, "Make it up again.")
    found["tables"]["claim"]["than"] = "form=lora,contrast=pairs"
    write_result(tmp_path / GRID, found)
    page = said(tmp_path)
    assert tables["design"]["start"] == {"form": "lora", "contrast": "none"} and grid.tables.claim is not None
    for than in ("LoRA, pairs", "LoRA, no contrast"):
        assert f"| arm | area over {than}'s curve |" in page
    assert "Left out, because no pair has the whole curve of them: full DPO." in page


def test_tables_say_when_their_pairs_are_too_few(tmp_path):
    make_up(tmp_path, lambda cell: by_form(cell, 0.2), keep=lambda cell: cell.seed < 3)
    page = said(tmp_path)
    assert "Nothing here can be clear: p of 3 comparisons of 6 pairs cannot be below 0.094." in page
    assert (
        "No factor's share of the gap can be clear: every mixture of its two ends is there in 6 pairs" in page
        and "p of 2 shares cannot be below 0.062" in page
    )
    assert "Nothing here can be clear" not in said_of(tmp_path / "more", seeds=6)


def said_of(folder: Path, seeds: int) -> str:
    make_up(folder, by_form, keep=lambda cell: cell.seed < seeds)
    return said(folder)


def test_no_best_mean_is_named_where_most_arms_lack_pairs(tmp_path):
    make_up(tmp_path, by_form, keep=lambda cell: cell.seed > 0 or cell.arm.name == "form=lora,contrast=none")
    assert "Which arm has the best mean is not said: 1 of 4 have all pairs." in said(tmp_path)


def check_that_nothing_is_cut(figure: Figure) -> None:
    """Everything that is drawn lies within the figure."""
    figure.draw_without_rendering()
    tight = figure.get_tightbbox()
    assert min(tight.x0, tight.y0) >= 0 and (tight.x1, tight.y1) <= tuple(figure.get_size_inches())


def test_every_arm_has_one_colour_in_all_figures_and_none_is_cut(tmp_path):
    make_up(tmp_path, by_form)
    grid = read_result(tmp_path / GRID, "")
    tables = read_tables(grid)
    findings = find(grid, tables, tables.claim, read_cells(tmp_path, grid))
    colours: dict[str, set[str]] = {}
    figures = [block for made in sections(findings) for block in made.blocks if isinstance(block, pages.Figure)]
    assert [figure.name for figure in figures] == [
        "verdict", "attribution", "effects", "curves", "curves_repetition", "pareto", "side_effects",
    ]  # fmt: skip
    for figure in figures:
        check_that_nothing_is_cut(figure.drawing)
        for legend in figure.drawing.legends:
            for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True):
                colours.setdefault(text.get_text(), set()).add(to_hex(to_rgba_array(handle.get_color())[0]))
    assert all(len(used) == 1 for used in colours.values()) and {*findings.labels.values()} <= {*colours}
    of_arms = [colours[label] for label in findings.labels.values()]
    assert len(set.union(*of_arms)) == len(of_arms), "no two arms share one"


def test_the_first_screen_has_the_question_the_answer_and_what_it_costs(tmp_path):
    make_up(tmp_path, lambda cell: by_form(cell, 0.15))
    page = said(tmp_path)
    first = page[: page.index("\n## ", page.index("## The result"))]
    parts = (
        "Does the form matter?",
        "*vector, pairs* has",
        "charts/verdict.png",
        "| warm_tone |",
        "**What it costs.**",
    )
    places = [first.index(part) for part in parts]
    assert places == sorted(places)
    assert "trains 576 numbers in 1.0 s (2.0 s of tuning before, 1.00 GB at the peak)" in first
    assert page.index("## Card") > page.index("## Cost") and "LoRA is as accurate." in page
    assert page.count("form=bias,contrast=pairs") == 1, "the name of an arm, once, in a table"
    assert "{'" not in page and "=" not in first.replace("p = ", "").replace("n = ", "")


def test_figures_are_png_and_svg_and_tables_latex_too(tmp_path, drawn):
    make_up(tmp_path, by_form, keep=lambda cell: cell.seed < 3)
    said(tmp_path)
    names = {file.stem for file in (tmp_path / "charts").glob("*.png")}
    assert names == {file.stem for file in (tmp_path / "charts").glob("*.svg")} and "verdict" in names
    once = (tmp_path / "charts" / "verdict.svg").read_bytes()
    said(tmp_path)
    assert (tmp_path / "charts" / "verdict.svg").read_bytes() == once
    table = (tmp_path / "tables" / "comparisons.tex").read_text(encoding="utf-8")
    assert table.startswith("\\begin{tabular}") and "95 \\%" in table and "vector, pairs & 0." in table


@pytest.mark.parametrize(
    ("levels", "label"),
    [
        ({"form": "bias", "layers": "one", "contrast": "pairs", "norm": "free"}, "vector, one layer, pairs"),
        ({"form": "lora", "layers": "all", "contrast": "none", "norm": "-"}, "LoRA, all layers, no contrast"),
        ({"form": "low_rank", "layers": "one", "contrast": "pairs", "norm": "free"}, "low rank, one layer, pairs"),
        (
            {"form": "bias", "layers": "one", "contrast": "pairs", "norm": "capped"},
            "vector, one layer, pairs, norm capped",
        ),
    ],
)
def test_an_arm_is_called_by_what_sets_it_apart(levels, label):
    tables = tomllib.loads(TABLES)
    form, contrast = tables["factors"]["form"] | {"low_rank": {}}, tables["factors"]["contrast"]
    layers, norm = {"all": {}, "one": {}}, {"free": {}, "capped": {}}
    tables["factors"] = {"form": form, "layers": layers, "contrast": contrast, "norm": norm}
    tables["design"]["start"] |= {"layers": "all", "norm": "free"}
    tables["design"]["end"] |= {"layers": "one", "norm": "free"}
    others = [
        {"form": "bias", "layers": "all", "contrast": "pairs", "norm": "free"},
        {"form": "lora", "layers": "one", "contrast": "none", "norm": "capped"},
    ]
    arms = [{"name": named(one), "levels": one} for one in (levels, *others)] + [{"name": "icv", "levels": None}]
    labels = arm_labels(GridTables(**tables), arms)
    assert labels[named(levels)] == label and labels["icv"] == "ICV" and len(set(labels.values())) == len(arms)


def test_arms_that_would_have_the_same_label_keep_their_names():
    tables = GridTables(**tomllib.loads(TABLES))
    arms = [{"name": name, "levels": {"form": "bias", "contrast": "x"}} for name in ("a_one", "a_two")]
    assert arm_labels(tables, [*arms, {"name": "lora_x", "levels": {"form": "lora"}}]) == {
        "a_one": "a_one", "a_two": "a_two", "lora_x": "LoRA",
    }  # fmt: skip


def test_curves_show_the_base_model_and_name_every_arm(tmp_path):
    grid = make_up(
        tmp_path, by_form, keep=lambda c: (c.arm.name, c.task.label) != ("form=bias,contrast=none", "cautious_advice")
    )
    cells = cells_of(tmp_path)
    arms = [arm.name for arm in grid.arms if arm.levels]
    figure = charts.curves(cells, arms, "accuracy@matched", "accuracy", charts.colours(arms))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == arms, "also what the first panel lacks"
    check_that_nothing_is_cut(figure)
    for axis in figure.axes:
        [base] = [line for line in axis.lines if line.get_linestyle() == "--"]
        assert set(base.get_ydata()) == {0.5}


def test_the_baseline_of_a_recovered_gain_is_no_comparison_of_its_own(tmp_path):
    grid = make_up(tmp_path, by_form)
    cells = cells_of(tmp_path)
    claim = grid.tables.claim.model_copy(update={"recovers": 0.5, "than": "form=bias,contrast=none"})
    found = {one.arm: one for one in recovered(cells, claim)}
    assert found[claim.than].share == 1.0
    alone = difference_of(cells, claim, claim.better)
    assert found[claim.better].ahead.p <= 3 * alone.p + 1e-12, "Holm over the three others"


def difference_of(cells, claim, arm):
    wide = scores(with_base(cells, "base"), claim.column)
    return difference(wide[arm] - wide["base"] - claim.recovers * (wide[claim.than] - wide["base"]))


def test_an_arm_without_a_strength_is_named_not_compared(tmp_path, capsys):
    make_up(tmp_path, by_form)
    page = said(tmp_path)
    assert "Not compared, because they have no strength that could be matched: full DPO." in page
    assert "| full DPO |" in page, "it is still in the other tables"
    counts = json.loads((tmp_path / "report.json").read_text())["counts"]
    assert f"## The result counts {counts} the hypothesis" in page
    capsys.readouterr()
    assert report.main([str(tmp_path), "--strength", "tuned", "--json"]) == 0
    found, page = json.loads(capsys.readouterr().out), (tmp_path / "report.md").read_text()
    assert "Not compared" not in page and found["counts"] == "not claimed"
    assert len(found["answer"]) == 3 and all(sentence in page.replace("*", "") for sentence in found["answer"])


def place(cell: Cell) -> tuple[str, int, int, str]:
    return cell.task.label, cell.examples, cell.seed, cell.arm.name


def test_failed_diverged_and_missing_cells_are_shown(tmp_path):
    grid = make_up(tmp_path, by_form)
    diverged, failed, missing = (c for c in grid.cells()[:15:5])
    file = tmp_path / diverged.path / "cell.json"
    record = Record.read(file)
    error = "The loss is nan at step 3"
    record.facts |= {"status": "diverged", "error": error, "setting": None}
    Record(record.keys, {BASE: record.observations[BASE]}, record.facts).write(file)
    (tmp_path / failed.path / "cell.json").rename(tmp_path / failed.path / "failed.json")
    (tmp_path / failed.path / "failed.json").write_text(json.dumps({"error": "out of memory"}))
    (tmp_path / missing.path / "cell.json").unlink()
    labels = arm_labels(grid.tables, read_result(tmp_path / GRID, "")["arms"])
    page = said(tmp_path)
    total = len(grid.cells())
    assert f"{total - 2} of {total} cells" in page
    for words in ("The loss is nan at step 3", "out of memory", f"| {labels[diverged.arm.name]} | diverged |"):
        assert words in page
    row = cells_of(tmp_path).set_index(["task", "examples", "seed", "arm"]).loc[place(diverged)]
    assert row["accuracy@tuned"] == row["accuracy@matched"] == row["accuracy@0"]
    assert row["kl@tuned"] == 0 and row["perplexity@tuned"] == row["perplexity@0"]


def test_the_page_opens_without_a_network_and_runs_no_code(tmp_path):
    grid = make_up(tmp_path, by_form, keep=lambda cell: cell.arm.name != "full_dpo")
    home = tmp_path / grid.cells()[4].path
    home.mkdir(parents=True)
    picture = "![](http://nowhere.invalid/x.png)"
    (home / "failed.json").write_text(json.dumps({"error": f"<script>alert(1)</script> {picture}"}))
    found = read_result(tmp_path / GRID, "")
    found["tables"]["name"] = "</title><script>alert(2)</script>"
    write_result(tmp_path / GRID, found)
    said(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 7
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "<table>" in page


def test_a_report_makes_no_arm_of_the_grid_it_reads(tmp_path, monkeypatch):
    """Which may name functions to import, and files."""
    make_up(tmp_path, by_form)
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    found = read_result(tmp_path / GRID, "")
    for levels in found["tables"]["factors"].values():
        for patch in levels.values():
            patch["augmentation"] = {"name": "function", "function": "evil:more"}
    found["tables"]["base"] = str(tmp_path / "nowhere.toml")
    write_result(tmp_path / GRID, found)
    assert "counts for the hypothesis" in said(tmp_path)
    assert "evil" not in sys.modules


def test_the_command_names_no_folder_of_a_machine(tmp_path):
    make_up(tmp_path, by_form)
    page = said(tmp_path)
    assert "python -m steertune.recipes.ablate made_up --data-root DATA" in page
    assert str(tmp_path) not in page and "/somewhere" not in page


def test_the_table_has_a_row_for_every_value(tmp_path):
    grid = make_up(tmp_path, by_form)
    said(tmp_path)
    table = pd.read_parquet(tmp_path / "cells.parquet")
    assert tuple(table.columns) == COLUMNS
    one, cell = table, grid.cells()[3]
    for name, value in zip(("task", "examples", "seed", "arm"), place(cell), strict=True):
        one = one[one[name] == value]
    margins = one[(one["strength"] == MATCHED) & (one["measure"] == "margin")].sort_values("example")
    assert margins["value"].tolist() == Record.read(tmp_path / cell.path / "cell.json").observations[MATCHED]["margin"]
    [parameters] = one[one["measure"] == "parameters"]["value"]
    assert parameters == 576


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: None, "holds no grid"),
        (lambda folder: (folder / GRID).write_text("{}"), "holds no grid"),
        (lambda folder: (folder / GRID).write_text("not json"), "is damaged"),
        (lambda folder: make_up(folder, by_form, keep=lambda cell: False), "holds no cells"),
        (lambda folder: _spoil(folder, "[1]"), "this is list"),
        (lambda folder: _spoil(folder, '{"version": 0}'), "version 0"),
        (lambda folder: _spoil(folder, '{"format": 99}'), "has format 99, this version reads"),
    ],
)
def test_what_is_no_grid_is_refused(damage, message, tmp_path, capsys):
    damage(tmp_path)
    assert report.main([str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def _spoil(folder: Path, text: str) -> None:
    grid = make_up(folder, by_form, keep=lambda cell: cell.seed == 0)
    (folder / grid.cells()[0].path / "cell.json").write_text(text)


def test_an_unknown_measure_of_the_claim_is_refused():
    tables = tomllib.loads(TABLES)
    tables["claim"]["measure"] = "acuracy"
    with pytest.raises(ArmError, match="claim.measure"):
        make_grid(tables)


def test_answers_without_a_judgement_make_no_difference(tmp_path):
    """Two arms that are equal, and better with more examples: rows that one could not be judged on with few examples
    must not be compared with the other's mean."""
    grid = make_up(tmp_path, lambda cell: 0.3 if cell.examples == 4 else 0.9)
    claim = grid.tables.claim.model_copy(update={"measure": "behaviour"})

    def edit(record: Record) -> None:
        few = record.keys["examples"] == 4
        scores = [0.3 if few else 0.9] * 16
        unjudged = few and record.keys["arm"] == claim.better
        record.observations[TUNED]["score"] = [None] * 12 + scores[12:] if unjudged else scores
        record.observations[MATCHED] = record.observations[TUNED]

    make_scalable = lambda record: MATCHED in record.observations and edit(record)  # noqa: E731
    change(tmp_path, make_scalable)
    cells = cells_of(tmp_path)
    found = verdict(cells, claim)
    assert found.side == "undecided" and "a difference of +0.000" in found.sentence


def test_pairs_that_are_left_out_are_counted_and_many_leave_the_verdict_open(tmp_path):
    grid = make_up(tmp_path, lambda cell: by_form(cell, 0.15))
    cells, claim = cells_of(tmp_path), grid.tables.claim
    pairs = len(cells[["task", "seed"]].drop_duplicates())
    for count, side in ((1, "for"), (4, "undecided")):
        chosen = cells["seed"].isin([0, 1, 2, 3][:count]) & (cells["arm"] == claim.better)
        chosen &= cells["task"] == cells["task"].iloc[0]
        lost = cells.assign(status=cells["status"].mask(chosen, "unmatched"))
        lost["accuracy@matched"] = cells["accuracy@matched"].mask(chosen)
        found = verdict(lost, claim)
        assert found.side == side, found.sentence
        assert (
            f"{pairs - count} of {pairs} pairs of task and seed, {count} left out: {3 * count} unmatched"
            in found.sentence
        )


def test_the_best_arm_has_every_pair(tmp_path):
    """An arm that ran on the easy task only has the highest mean, and is not the best."""
    hard = {"form=lora,contrast=pairs": "warm_tone"}  # which this arm did not run on
    easy = lambda cell: by_form(cell, 0.05) + (cell.task.label != "warm_tone") * 0.3  # noqa: E731
    make_up(tmp_path, easy, keep=lambda cell: hard.get(cell.arm.name) != cell.task.label)
    assert re.search(r"best mean of the 3 arms with every pair is \*vector", said(tmp_path))


def test_tasks_of_the_same_rows_are_one_task_when_rows_are_crossed(tmp_path):
    grid = make_up(tmp_path, by_form)
    cells = cells_of(tmp_path)
    assert in_pairs(cells, grid.tables.tasks) is cells
    name = grid.tasks[0].name
    same = [TaskTable(name=name, label=task.label) for task in grid.tasks]
    found = in_pairs(cells, same)
    assert set(found["task"]) == {name} and found["seed"].nunique() == 2 * cells["seed"].nunique()
    assert len(found[["task", "seed"]].drop_duplicates()) == len(cells[["task", "seed"]].drop_duplicates())
    claim = grid.tables.claim
    one, two = (scores(c, claim.column)[claim.better] - scores(c, claim.column)[claim.than] for c in (found, cells))
    assert difference(one).estimate == pytest.approx(difference(two).estimate)
    by_hand = crossed_interval(np.stack([*two.sort_index(level=["task", "seed"])]))
    assert vars(difference(one).crossed) == pytest.approx(vars(by_hand))


@pytest.mark.parametrize("message", ["", "AssertionError: "])
def test_a_cell_that_failed_without_a_word_and_one_that_diverged_have_their_place(message, tmp_path):
    grid = make_up(tmp_path, by_form)
    failed, *rest = grid.cells()
    (tmp_path / failed.path / "cell.json").rename(tmp_path / failed.path / "failed.json")
    (tmp_path / failed.path / "failed.json").write_text(json.dumps({"error": message}))
    for cell in rest:
        if cell.arm.name == "full_dpo":
            file = tmp_path / cell.path / "cell.json"
            record = Record.read(file)
            record.facts |= {"status": "diverged", "error": "nan", "setting": None}
            base = {k: v for k, v in record.observations[BASE].items() if k != "neutral_nll"}
            Record(record.keys, {BASE: base}, record.facts).write(file)
    page = said(tmp_path)
    assert "| failed |" in page and "| full DPO | diverged |" in page
    header, _, *rows = next(table for table in tables_of(page) if "perplexity ↓" in table[0])
    lost = dict(zip(header, next(row for row in rows if row[0] == "full DPO"), strict=True))
    left = [
        lost[title] for title in ("KL to the base, nats per token ↓", "perplexity ↓", "perplexity, times the base's ↓")
    ]
    assert [cell.partition(" ")[0] for cell in left] == ["0.000", "5.500", "1.000"], (
        "what its user is left with is the base"
    )
