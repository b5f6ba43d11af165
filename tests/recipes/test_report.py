"""What a report concludes from cells that were made up, so that the right answer is known."""

from __future__ import annotations

import itertools
import re
import tomllib

import numpy as np
import pandas as pd
import pytest
from made_up import (  # noqa: F401  fixtures
    ROWS,
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

from steertune.recipes.ablate import GRID
from steertune.recipes.ablation.analysis import attribution, by_examples, comparisons, in_pairs, scores
from steertune.recipes.ablation.cells import column
from steertune.recipes.ablation.claims import recovered, verdict
from steertune.recipes.ablation.grid import make_grid
from steertune.recipes.ablation.statistics.paired import crossed_interval, difference
from steertune.recipes.ablation.statistics.rows import examples_of, rows_of, with_base
from steertune.recipes.ablation.tables import TaskTable
from steertune.recipes.lab import measures
from steertune.recipes.lab.files import ArmError, read_result, write_result
from steertune.recipes.lab.rows import BASE, MATCHED, TUNED, Record


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


def test_the_examples_of_every_measure_have_its_mean(tmp_path):
    make_up(tmp_path, by_form, keep=lambda cell: cell.examples == 4)
    change(tmp_path, lambda record: record.observations[TUNED].update(score=[0.5, None, 0.7]))
    cells = cells_of(tmp_path)
    for measure, strength in itertools.product(measures.names(), (BASE, TUNED, MATCHED)):
        name = column(measure, strength)
        for value, rows in zip(cells[name], rows_of(cells, name), strict=True):
            assert (rows is None) == bool(np.isnan(value)), name
            assert rows is None or np.nanmean(rows) == pytest.approx(value), name
            assert rows is None or len(rows) == ROWS or measure not in ("accuracy", "margin_gain", "moved_wrong")


def test_the_attribution_names_the_factor_and_adds_up(made):
    page = made.page
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


def test_no_best_mean_is_named_where_most_arms_lack_pairs(tmp_path):
    make_up(tmp_path, by_form, keep=lambda cell: cell.seed > 0 or cell.arm.name == "form=lora,contrast=none")
    assert "No best mean is given, because only 1 of 4 arms have all pairs." in said(tmp_path)


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
