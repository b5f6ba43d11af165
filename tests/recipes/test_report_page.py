"""What the page of a report shows, of cells that were made up."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
from made_up import (  # noqa: F401  fixtures
    TABLES,
    by_form,
    cells_of,
    change,
    drawn,
    ends_in,
    made,
    make_up,
    pictures,
    said,
    tables_of,
)
from matplotlib.colors import to_hex, to_rgba_array
from matplotlib.figure import Figure

from steertune.recipes import report
from steertune.recipes.ablate import GRID
from steertune.recipes.ablation import charts
from steertune.recipes.ablation.cells import read_cells
from steertune.recipes.ablation.findings import find
from steertune.recipes.ablation.grid import Cell
from steertune.recipes.ablation.labels import arm_labels
from steertune.recipes.ablation.levels import named
from steertune.recipes.ablation.sections import sections
from steertune.recipes.ablation.tables import GridTables, read_tables
from steertune.recipes.lab import pages
from steertune.recipes.lab.files import read_result, write_result
from steertune.recipes.lab.rows import BASE, COLUMNS, MATCHED, TUNED, Record


def test_learning_rates_at_the_edge_of_what_was_tried_are_named(made):
    assert "Learning rates that were tried" in made.page and "Of 5 trained arms" in made.page


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
    assert compared or "1 seed" in page.read_text(encoding="utf-8")


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


def test_the_first_screen_has_the_question_the_answer_and_what_it_costs(made):
    page = made.page
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


def test_an_arm_without_a_strength_is_named_not_compared(made, tmp_path, capsys):
    page = made.page
    assert "Not compared, because they have no strength that could be matched: full DPO." in page
    assert "| full DPO |" in page, "it is still in the other tables"
    counts = json.loads((made.folder / "report.json").read_text())["counts"]
    assert f"## The result counts {counts} the hypothesis" in page
    capsys.readouterr()
    assert report.main([str(made.folder), "--strength", "tuned", "--output", str(tmp_path), "--json"]) == 0
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


def test_the_command_names_no_folder_of_a_machine(made):
    assert "python -m steertune.recipes.ablate made_up --data-root DATA" in made.page
    assert str(made.folder) not in made.page and "/somewhere" not in made.page


def test_the_table_has_a_row_for_every_value(made):
    table = pd.read_parquet(made.folder / "cells.parquet")
    assert tuple(table.columns) == COLUMNS
    one, cell = table, made.grid.cells()[3]
    for name, value in zip(("task", "examples", "seed", "arm"), place(cell), strict=True):
        one = one[one[name] == value]
    margins = one[(one["strength"] == MATCHED) & (one["measure"] == "margin")].sort_values("example")
    assert (
        margins["value"].tolist() == Record.read(made.folder / cell.path / "cell.json").observations[MATCHED]["margin"]
    )
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
