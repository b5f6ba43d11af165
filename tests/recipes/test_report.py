"""The report on cells that were made up, so that what it should say is known."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from steertune.recipes import report
from steertune.recipes.ablate import GRID, write_grid
from steertune.recipes.ablation import charts
from steertune.recipes.ablation.analysis import (
    MEASURES,
    attribution,
    by_examples,
    comparisons,
    in_pairs,
    recovered,
    scores,
    verdict,
)
from steertune.recipes.ablation.grid import Cell, Grid, make_grid
from steertune.recipes.ablation.keys import VERSION
from steertune.recipes.ablation.statistics.paired import crossed_interval, difference
from steertune.recipes.ablation.statistics.rows import rows_of, with_base
from steertune.recipes.ablation.tables import TaskTable
from steertune.recipes.ablation.tidy import read_cells
from steertune.recipes.lab.arm import ArmError
from steertune.recipes.lab.files import read_result, write_result

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
measure = "matched_accuracy"

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
        margins = np.where(right, 1.0, -1.0).tolist()
        matched = cell.arm.levels is not None  # full finetuning has no strength
        values = {"accuracy": float(right.mean()), "margin_gain": 1.0, "moved_wrong": 0.2, "behaviour": 0.6}
        found = {
            "version": VERSION, "key": cell.key, "task": cell.task.label, "arm": cell.arm.name, "error": None,
            "levels": cell.arm.levels, "examples": cell.examples, "seed": cell.seed, "status": "ok", "tuning": [],
            "setting": {"rate": 1.0, "steps": 16, "strength": 1.0}, "kl": 0.1, "perplexity": 6.0, "repetition": 0.0,
            "base_accuracy": 0.5, "base_perplexity": 5.5, "base_behaviour": 0.5, "base_repetition": 0.0,
            "margins": margins, "judgements_failed": 0, "parameters": 576, "train_seconds": 1.0, "tuning_seconds": 2.0,
            "pairs_read": 64, "tokens_read": 999, "peak_memory_gb": 1.0, "scalable": matched, **values,
        }  # fmt: skip
        if matched:
            found |= {f"matched_{name}": value for name, value in (values | {"margins": margins}).items()}
        home = folder / cell.path
        home.mkdir(parents=True)
        (home / "cell.json").write_text(json.dumps(found))
    return grid


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
    cells = read_cells(tmp_path)
    claim = grid.tables.claim
    right = (np.sign(np.stack(cells["matched_margins"][cells["arm"].isin([claim.better, claim.than])])) + 1) / 2
    by_pair = right.reshape(2, 3, 6, 2, ROWS).mean(axis=1)  # task, examples, seed, arm (better first), row
    expected = crossed_interval(*(by_pair[:, :, 0] - by_pair[:, :, 1]))
    assert str(expected) in verdict(cells, claim).sentence and str(expected) in page
    assert page.index("## Card") < page.index("## The result")
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
    cells = read_cells(tmp_path)
    found = verdict(cells, claim, attribution(cells, grid.tables, claim.measure, claim.factor))
    assert (found.side, words in found.sentence) == (side, True), found.sentence


@pytest.mark.parametrize(("own", "side"), [(0.85, "for"), (0.6, "against"), (0.775, "undecided"), (0.4, "against")])
def test_a_share_of_a_gain_over_the_base_model_is_decided(own, side, tmp_path):
    """The base has 0.5, `than` 0.8, so 0.9 of its gain is 0.27."""
    grid = make_up(tmp_path, lambda cell: 0.5)
    claim = grid.tables.claim.model_copy(update={"recovers": 0.9})
    cells = read_cells(tmp_path)
    reached = cells["arm"].map({claim.better: own, claim.than: 0.8}).fillna(0.5)
    cells["base_margins"] = [[1.0, -1.0] * (ROWS // 2)] * len(cells)
    noise = np.random.default_rng(0)
    for i in cells.index:  # which rows are right is chance, how many is not
        margins = noise.permutation(np.where(np.arange(ROWS) < round(ROWS * reached[i]), 1.0, -1.0))
        cells.at[i, "matched_margins"] = margins.tolist()
        cells.at[i, "matched_accuracy"] = float((margins > 0).mean())
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
    cells = read_cells(tmp_path)
    right = cells["arm"].map({claim.better: 0.5, claim.than: 0.3}).fillna(0.5)
    margins = [np.where(np.arange(ROWS) < ROWS * share, 1.0, -1.0).tolist() for share in right]
    cells = cells.assign(matched_margins=margins, matched_accuracy=right, base_accuracy=0.6)
    cells["base_margins"] = [np.where(np.arange(ROWS) < ROWS * 0.6, 1.0, -1.0).tolist()] * len(cells)
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
    for file in tmp_path.rglob("cell.json"):
        cell = json.loads(file.read_text())
        if (cell["levels"] or {}).get("form") == "lora":
            cell["levels"]["contrast"] = "-"
            file.write_text(json.dumps(cell))
    section = said(tmp_path).split("## Effect of each factor")[1].split("\n## ")[0]
    assert grid.tables.design.start["contrast"] == "none" and "counts as `contrast=none`" in section
    assert re.search(r"\| form \| bias − lora \| \+0\.1", section)


def test_learning_rates_at_the_edge_of_what_was_tried_are_named(tmp_path):
    make_up(tmp_path, by_form)
    page = said(tmp_path)
    assert "Learning rates that were tried" in page and "Of 5 trained arms" in page


def test_a_claim_of_a_share_has_its_section(tmp_path):
    make_up(tmp_path, lambda cell: by_form(cell, 0.15))
    grid = read_result(tmp_path / GRID, "")
    grid["tables"]["claim"]["recovers"] = 0.9
    write_result(tmp_path / GRID, grid)
    for file in tmp_path.rglob("cell.json"):
        cell = json.loads(file.read_text())
        file.write_text(json.dumps({**cell, "base_margins": [1.0, -1.0] * (ROWS // 2)}))
    page = said(tmp_path)
    than = grid["tables"]["claim"]["than"]
    assert f"## Recovered of {than}'s gain" in page
    assert "gain over the base model" in page.split("## The result")[0]


def test_that_most_of_the_gap_is_one_factor_s_takes_every_mixture(tmp_path):
    grid = make_up(tmp_path, by_form, keep=lambda cell: cell.arm.name != "form=lora,contrast=pairs")
    claim = grid.tables.claim.model_copy(update={"factor": "form"})
    cells = read_cells(tmp_path)
    found = attribution(cells, grid.tables, claim.measure, "form")
    assert not found.shares and "form=lora,contrast=pairs" in found.why
    assert verdict(cells, claim, found).side == "undecided"
    assert f"Shares of the gap are not computed: {found.why}." in said(tmp_path)


def test_a_gain_on_these_test_rows_only_is_no_gain(tmp_path):
    """Every seed gains by the same few rows: sure for these rows, chance for others."""
    grid = make_up(tmp_path, lambda cell: 0.5)
    for cell in grid.cells():
        file = tmp_path / cell.path / "cell.json"
        found = json.loads(file.read_text())
        if (cell.arm.levels or {}).get("form") == "bias":
            lucky = np.array(found["matched_margins"])
            lucky[:2] = 1.0
            found |= {"matched_margins": lucky.tolist(), "matched_accuracy": float((lucky > 0).mean())}
            file.write_text(json.dumps(found))
    cells, claim = read_cells(tmp_path), grid.tables.claim
    [against] = [c for c in comparisons(cells, claim.than, claim.measure) if c.arm == claim.better]
    assert against.difference.interval.excludes_zero and against.difference.permutation < 0.05
    assert not against.difference.clear() and verdict(cells, claim).side == "undecided"


def test_another_measure_than_the_claim_s_is_no_verdict(tmp_path):
    make_up(tmp_path, lambda cell: by_form(cell, 0.15))
    page = report.write_report(tmp_path, "accuracy").read_text(encoding="utf-8")
    assert "## A look at another measure" in page and "neither for nor against the hypothesis" in page
    assert "## The result counts" not in page


def test_another_folder_can_be_written_to(tmp_path):
    make_up(tmp_path / "grid", by_form, keep=lambda cell: cell.examples == 4)
    page = report.write_report(tmp_path / "grid")
    of_the_claim = page.read_text(encoding="utf-8")
    options = ["--measure", "accuracy", "--output", str(tmp_path / "look" / "accuracy")]
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
    pd.read_parquet(tmp_path / "cells.parquet").assign(version=VERSION - 1).to_parquet(tmp_path / "cells.parquet")
    assert report.main([str(tmp_path)]) == 2
    assert f"of version {{{VERSION - 1}}}" in capsys.readouterr().err
    (tmp_path / "cells.parquet").write_text("no table")
    assert report.main([str(tmp_path)]) == 2
    assert "is no table of cells" in capsys.readouterr().err


def column(header: list[str], title: str, row: list[str]) -> tuple[float, float]:
    """The ends of an interval in a row of a report's table; infinite where they are unknown."""
    text = row[header.index(title)]
    low, high = map(float, text.strip("[]").split(", ")) if text != "unknown" else (-np.inf, np.inf)
    return low, high


def tables_of(page: str) -> list[list[list[str]]]:
    """The tables of a page, each a list of rows."""
    found = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    return [[line.strip("| ").split(" | ") for line in table.splitlines()] for table in found]


def test_the_effects_table_has_tasks_as_a_sample_beside_the_other_intervals(tmp_path):
    """Pairs help by 0.3 in one task and not at all in the other: surely in these two, and who knows in others."""
    make_up(tmp_path, lambda cell: 0.4 + 0.3 * ("contrast=pairs" in cell.arm.name and cell.task.label == "warm_tone"))
    header, _, *rows = next(table for table in tables_of(said(tmp_path)) if "level against reference" in table[0])
    row = next(row for row in rows if row[0] == "contrast")
    title = header.index("95 %, other tasks too")
    assert header[title - 2 : title + 2] == [
        "95 %, these test rows",
        "95 %, other test rows too",
        "95 %, other tasks too",
        "p (Holm)",
    ]
    assert column(header, "95 %, other test rows too", row)[0] > 0.05
    by_task = read_cells(tmp_path).groupby(["task", "contrast"])["matched_accuracy"].mean().unstack("contrast")
    means = by_task["pairs"] - by_task["none"]
    reach = 12.706 * abs(means.iloc[0] - means.iloc[1]) / 2
    expected = (means.mean() - reach, means.mean() + reach)
    assert column(header, "95 %, other tasks too", row) == pytest.approx(expected, abs=2e-3)


PUBLISHED = sorted((Path(report.__file__).parent / "results").rglob("report.md"))


@pytest.mark.parametrize("page", PUBLISHED, ids=lambda page: page.parent.name)
def test_no_published_interval_is_narrower_than_one_that_allows_for_less(page):
    titles = ["95 %, these test rows", "95 %, other test rows too", "95 %, other tasks too"]
    compared = 0
    for header, _, *rows in tables_of(page.read_text(encoding="utf-8")):
        there = [title for title in titles if title in header]
        for row, (less, more) in itertools.product(rows, itertools.pairwise(there)):
            (low, high), (lower, higher) = column(header, less, row), column(header, more, row)
            assert lower <= low and high <= higher, row
            compared += 1
    assert compared


@pytest.mark.parametrize("measure", MEASURES)
def test_rows_of_a_measure_have_its_mean(measure, tmp_path):
    make_up(tmp_path, by_form)
    cells = read_cells(tmp_path)
    cells["base_margins"] = [[0.5] * ROWS] * len(cells)
    for prefix in ("", "matched_"):
        cells[f"{prefix}margin_gain"] = [
            np.nan if m is np.nan else np.mean(m) - 0.5 for m in cells[f"{prefix}margins"]
        ]
        cells[f"{prefix}behaviours"] = [[0.5, None, 0.7]] * len(cells)
    for value, rows in zip(cells[measure], rows_of(cells, measure), strict=True):
        assert (rows is None) == bool(np.isnan(value))
        if rows is not None:
            assert np.nanmean(rows) == pytest.approx(value) and len(rows) == (3 if "behaviour" in measure else ROWS)


def test_the_report_says_what_it_was_made_with(tmp_path):
    grid = make_up(tmp_path, by_form)
    for cell in grid.cells():
        file = tmp_path / cell.path / "cell.json"
        other = {"versions": f"torch {cell.seed % 2}", "scorer": "a rule", "matched_judgements_failed": 1}
        file.write_text(json.dumps(json.loads(file.read_text()) | other))
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
    effect = re.search(r"\| form \| bias − lora \| ([+-][\d.]+) \|", page)
    assert float(effect[1]) == pytest.approx(0.1, abs=0.02)


def test_what_a_vector_with_four_examples_is_worth_in_loras(tmp_path):
    # LoRA gains 0.02 with every doubling, the vector is 0.06 ahead: three doublings
    make_up(tmp_path, lambda cell: by_form(cell, 0.06))
    row = re.search(r"\| form=bias,contrast=pairs \| .* \| (\d+) \[(\d+), > 64\] \| .* \| (.*) \|", said(tmp_path))
    estimate, low = map(int, row.groups()[:2])
    assert 24 <= estimate <= 40 and 8 <= low <= estimate
    assert row[3].startswith("> 64 ["), "64 examples of the vector are worth more than LoRA has in the grid"


def test_every_number_of_examples_has_its_means_and_its_differences(tmp_path):
    grid = make_up(tmp_path, lambda cell: by_form(cell, 0.06 * np.log2(cell.examples) / 6))
    page, claim = said(tmp_path), grid.tables.claim
    assert "Scores are means over n = 4, 16, 64." in page
    cells = read_cells(tmp_path)
    found = by_examples(cells, claim.than, claim.measure)
    for n in (4, 16, 64):
        own = cells[cells["examples"] == n]
        wide = own.pivot_table(index=["task", "seed"], columns="arm", values=claim.measure)
        value, gap = found[claim.better][n]
        assert value == pytest.approx(wide[claim.better].mean())
        assert gap.estimate == pytest.approx((wide[claim.better] - wide[claim.than]).mean())
        assert f"{value:.3f} ({gap}, p " in page
        assert found[claim.than][n] == (pytest.approx(wide[claim.than].mean()), None)
    assert "How much larger the effect is with 64 examples than with 4:" in page
    row = re.search(r"64 examples than with 4:.*?\| form \| bias − lora \| ([+-][\d.]+) \|", page, re.DOTALL)
    assert float(row[1]) == pytest.approx(0.04, abs=0.02)


def test_arms_are_measured_in_examples_of_the_claim_s_baseline_and_of_the_design_s_start(tmp_path):
    tables = tomllib.loads(TABLES)
    grid = make_up(tmp_path, by_form)
    found = read_result(tmp_path / GRID, "Make it up again.")
    found["tables"]["claim"]["than"] = "form=lora,contrast=pairs"
    write_result(tmp_path / GRID, found)
    page = said(tmp_path)
    assert tables["design"]["start"] == {"form": "lora", "contrast": "none"} and grid.tables.claim is not None
    for than in ("form=lora,contrast=pairs", "form=lora,contrast=none"):
        assert f"| arm | area over {than}'s curve |" in page
    assert "Left out, because no pair has the whole curve of them: full_dpo." in page


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


def test_curves_show_the_base_model_and_name_every_arm(tmp_path, monkeypatch):
    figures = []

    class Kept(charts.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr(charts, "Figure", Kept)
    grid = make_up(
        tmp_path, by_form, keep=lambda c: (c.arm.name, c.task.label) != ("form=bias,contrast=none", "cautious_advice")
    )
    cells = read_cells(tmp_path)
    arms = [arm.name for arm in grid.arms if arm.levels]
    charts.curves(cells, arms, "matched_accuracy", tmp_path / "x.png", "accuracy")
    [figure] = figures
    assert [text.get_text() for text in figure.legends[0].get_texts()] == arms, "also what the first panel lacks"
    for axis in figure.axes:
        [base] = [line for line in axis.lines if line.get_linestyle() == "--"]
        assert set(base.get_ydata()) == {0.5}


def test_the_baseline_of_a_recovered_gain_is_no_comparison_of_its_own(tmp_path):
    grid = make_up(tmp_path, by_form)
    cells = read_cells(tmp_path).assign(base_margins=[[1.0, -1.0] * (ROWS // 2)] * len(grid.cells()))
    claim = grid.tables.claim.model_copy(update={"recovers": 0.5, "than": "form=bias,contrast=none"})
    found = {one.arm: one for one in recovered(cells, claim)}
    assert found[claim.than].share == 1.0
    alone = difference_of(cells, claim, claim.better)
    assert found[claim.better].ahead.p <= 3 * alone.p + 1e-12, "Holm over the three others"


def difference_of(cells, claim, arm):
    wide = scores(with_base(cells, "base"), claim.measure)
    return difference(wide[arm] - wide["base"] - claim.recovers * (wide[claim.than] - wide["base"]))


def test_an_arm_without_a_strength_is_named_not_compared(tmp_path, capsys):
    make_up(tmp_path, by_form)
    page = said(tmp_path)
    assert "Not compared, because they have no strength that could be matched: full_dpo." in page
    assert "full_dpo |" in page, "it is still in the other tables"
    counts = json.loads((tmp_path / "report.json").read_text())["counts"]
    assert f"## The result counts {counts} the hypothesis" in page
    capsys.readouterr()
    assert report.main([str(tmp_path), "--measure", "accuracy", "--json"]) == 0
    found, page = json.loads(capsys.readouterr().out), (tmp_path / "report.md").read_text()
    assert "Not compared" not in page and found["counts"] == "not claimed"
    assert len(found["answer"]) == 3 and all(sentence in page for sentence in found["answer"])


def test_failed_diverged_and_missing_cells_are_shown(tmp_path):
    grid = make_up(tmp_path, by_form)
    diverged, failed, missing = (c for c in grid.cells()[:15:5])
    file = tmp_path / diverged.path / "cell.json"
    cell = {k: v for k, v in json.loads(file.read_text()).items() if "accuracy" not in k or k.startswith("base_")}
    file.write_text(json.dumps(cell | {"status": "diverged", "error": "The loss is nan at step 3", "setting": None}))
    (tmp_path / failed.path / "cell.json").rename(tmp_path / failed.path / "failed.json")
    (tmp_path / failed.path / "failed.json").write_text(json.dumps({"error": "out of memory"}))
    (tmp_path / missing.path / "cell.json").unlink()
    page = said(tmp_path)
    total = len(grid.cells())
    assert f"{total - 2} of {total} cells" in page
    for words in ("The loss is nan at step 3", "out of memory", f"| {diverged.arm.name} | diverged |"):
        assert words in page
    rows = pd.read_parquet(tmp_path / "cells.parquet").set_index(["task", "examples", "seed", "arm"])
    place = (diverged.task.label, diverged.examples, diverged.seed, diverged.arm.name)
    assert rows.loc[place, "accuracy"] == rows.loc[place, "base_accuracy"]


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
    assert page.count("data:image/png;base64,") == 4
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


def test_the_table_is_tidy(tmp_path):
    grid = make_up(tmp_path, by_form)
    said(tmp_path)
    table = pd.read_parquet(tmp_path / "cells.parquet")
    assert len(table) == len(grid.cells())
    assert {"task", "examples", "seed", "arm", "form", "contrast", "accuracy", "kl", "setting_steps"} <= {*table}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: None, "holds no grid"),
        (lambda folder: (folder / GRID).write_text("{}"), "holds no grid"),
        (lambda folder: (folder / GRID).write_text("not json"), "is damaged"),
        (lambda folder: make_up(folder, by_form, keep=lambda cell: False), "holds no cells"),
        (lambda folder: _spoil(folder, "[1]"), "this is list"),
        (lambda folder: _spoil(folder, '{"version": 0}'), "version 0"),
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
    cells, claim = read_cells(tmp_path), grid.tables.claim.model_copy(update={"measure": "behaviour"})
    score = cells["examples"].map(lambda n: 0.3 if n == 4 else 0.9)
    cells["behaviours"] = [[s] * 16 for s in score]
    unjudged = (cells["arm"] == claim.better) & (cells["examples"] == 4)
    cells.loc[unjudged, "behaviours"] = cells.loc[unjudged, "behaviours"].map(lambda b: [None] * 12 + b[12:])
    cells["behaviour"] = score
    found = verdict(cells, claim)
    assert found.side == "undecided" and "a difference of +0.000" in found.sentence


def test_pairs_that_are_left_out_are_counted_and_many_leave_the_verdict_open(tmp_path):
    grid = make_up(tmp_path, lambda cell: by_form(cell, 0.15))
    cells, claim = read_cells(tmp_path), grid.tables.claim
    pairs = len(cells[["task", "seed"]].drop_duplicates())
    for count, side in ((1, "for"), (4, "undecided")):
        chosen = cells["seed"].isin([0, 1, 2, 3][:count]) & (cells["arm"] == claim.better)
        chosen &= cells["task"] == cells["task"].iloc[0]
        lost = cells.assign(
            matched_accuracy=cells["matched_accuracy"].mask(chosen), status=cells["status"].mask(chosen, "unmatched")
        )
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
    assert re.search(r"best mean of the 3 arms with every pair is form=bias", said(tmp_path))


def test_tasks_of_the_same_rows_are_one_task_when_rows_are_crossed(tmp_path):
    grid = make_up(tmp_path, by_form)
    cells = read_cells(tmp_path)
    assert in_pairs(cells, grid.tables.tasks) is cells
    name = grid.tasks[0].name
    same = [TaskTable(name=name, label=task.label) for task in grid.tasks]
    found = in_pairs(cells, same)
    assert set(found["task"]) == {name} and found["seed"].nunique() == 2 * cells["seed"].nunique()
    assert len(found[["task", "seed"]].drop_duplicates()) == len(cells[["task", "seed"]].drop_duplicates())
    claim = grid.tables.claim
    one, two = (scores(c, claim.measure)[claim.better] - scores(c, claim.measure)[claim.than] for c in (found, cells))
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
            lost = {
                k: v
                for k, v in json.loads(file.read_text()).items()
                if k not in ("kl", "perplexity", "base_perplexity")
            }
            file.write_text(json.dumps(lost | {"status": "diverged", "error": "nan", "setting": None}))
    page = said(tmp_path)
    assert "| failed |" in page and "| full_dpo | diverged |" in page
    side = page[page.index("## Side effects") :]
    assert "| full_dpo | 0.000 | 5.500 |" in side, "what its user is left with is the base"
