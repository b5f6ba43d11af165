"""What a design can see, by hand and against simulated studies that go through the report's own tests."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from made_cells import BETTER, Made
from statsmodels.stats.power import TTestPower

from steertune.recipes.ablation import analysis
from steertune.recipes.ablation.cells import read_cells
from steertune.recipes.ablation.resolution import resolution
from steertune.recipes.ablation.statistics.paired import crossed_interval, judged, p_value, tasks_interval
from steertune.recipes.ablation.statistics.power import (
    MEASURED,
    Components,
    Design,
    components,
    detectable,
    larger,
    power,
)
from steertune.recipes.ablation.tables import read_tables
from steertune.recipes.lab.files import read_result

PARTS = Components(task=0.004, seed=0.002, row=0.03, rest=0.06)


def simulated(parts: Components, design: Design, delta: float, seed: int, fixed: bool = False) -> pd.Series:
    """Differences by task and seed, each an array over rows; fixed tasks have effects that do not change."""
    rng = np.random.default_rng(seed)
    shape = (design.tasks, design.seeds, design.rows)
    task = np.linspace(-1, 1, design.tasks)[:, None, None]
    task = task / task.std(ddof=1) if fixed else rng.normal(size=(design.tasks, 1, 1))
    values = delta + math.sqrt(parts.task) * task
    values = values + math.sqrt(parts.seed) * rng.normal(size=(*shape[:2], 1))
    values = values + math.sqrt(parts.row) * rng.normal(size=(shape[0], 1, shape[2]))
    values = values + math.sqrt(parts.rest) * rng.normal(size=shape)
    index = pd.MultiIndex.from_product([range(design.tasks), range(design.seeds)], names=["task", "seed"])
    return pd.Series([*values.reshape(-1, design.rows)], index=index, dtype=object)


def test_power_over_tasks_is_that_of_a_t_test_of_their_means() -> None:
    for tasks in (3, 8, 20):
        design = Design(tasks, seeds=4, rows=200)
        spread = math.sqrt(0.004 + 0.002 / 4 + 0.03 / 200 + 0.06 / 800)
        by_hand = TTestPower().power(effect_size=0.08 / spread, nobs=tasks, alpha=0.05)
        assert power(PARTS, design, 0.08, sample=True) == pytest.approx(by_hand, abs=1e-6)
        seen = detectable(PARTS, design, sample=True)
        assert seen / spread == pytest.approx(TTestPower().solve_power(nobs=tasks, alpha=0.05, power=0.8), rel=1e-3)


@pytest.mark.parametrize(
    ("design", "sample"),
    [
        (Design(8, 2, 24), True),
        (Design(6, 2, 100), True),
        (Design(4, 2, 24), False),  # few pairs have an exact permutation test
        pytest.param(Design(8, 2, 24), False, marks=pytest.mark.slow),
        pytest.param(Design(4, 3, 40), False, marks=pytest.mark.slow),
    ],
)
def test_power_is_how_often_simulated_studies_come_to_a_verdict(design: Design, sample: bool) -> None:
    delta, runs = detectable(PARTS, design, sample), 200
    hits = 0
    for seed in range(runs):
        tasks = judged(simulated(PARTS, design, delta, seed, fixed=not sample))
        over_tasks, over_rows = tasks_interval(*tasks), crossed_interval(*tasks)
        means = np.concatenate([values.mean(axis=1) for values in tasks])
        hits += (over_tasks.p if sample else max(over_rows.p, p_value(means))) < 0.05
    # a standard error of .028
    assert abs(hits / runs - 0.8) < 0.09, (delta, hits / runs)


def test_nothing_to_find_is_seen_at_the_level_at_most_and_too_few_see_nothing() -> None:
    assert power(PARTS, Design(8, 2, 200), 0.0, sample=True) == pytest.approx(0.05, abs=1e-6)
    assert power(PARTS, Design(8, 2, 200), 0.0, sample=False) <= 0.05
    assert detectable(PARTS, Design(1, 4, 200), sample=True) == math.inf, "one task says nothing of others"
    assert detectable(PARTS, Design(2, 2, 200), sample=False) == math.inf, "four pairs: no p below 0.12"
    assert detectable(PARTS, Design(8, 1, 200), sample=False) == math.inf, "one seed does not show how seeds vary"
    assert detectable(PARTS, Design(8, 1, 200), sample=True) < 0.1


def test_tasks_and_rows_buy_more_than_seeds() -> None:
    design = Design(8, 2, 32)
    now = detectable(PARTS, design, sample=True)
    bought = {name: now - detectable(PARTS, more, sample=True) for name, more in larger(design).items()}
    assert bought["one more task"] > bought["one more seed"] > 0 and bought["twice the rows"] > 0
    many = detectable(PARTS, Design(8, 200, 10**6), sample=True)
    assert many == pytest.approx(detectable(Components(0.004, 0, 0, 0), Design(8, 2, 2), sample=True), rel=0.02)


def test_components_are_found_again() -> None:
    design = Design(tasks=40, seeds=4, rows=60)
    found = components([simulated(PARTS, design, 0.1, seed) for seed in range(5)])
    assert found is not None
    for name in ("task", "seed", "row", "rest"):
        assert getattr(found, name) == pytest.approx(getattr(PARTS, name), rel=0.3), name
    assert components([simulated(PARTS, Design(1, 4, 20), 0.1, 0)]) is None
    # by hand: two tasks, two seeds, two rows; no interaction in either task
    index = pd.MultiIndex.from_product([["a", "b"], [0, 1]], names=["task", "seed"])
    gap = pd.Series([np.array(v) for v in ([0.0, 2.0], [1.0, 3.0], [5.0, 7.0], [6.0, 8.0])], index, dtype=object)
    # seeds differ by 1 (variance .5), rows by 2 (variance 2), task means 1.5 and 6.5: 12.5 less (.5 + 2) / 2
    assert components([gap]) == Components(task=11.25, seed=0.5, row=2.0, rest=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("measure", [*MEASURED])
def test_the_components_that_are_committed_are_those_of_the_studies(measure: str) -> None:
    results, studies = Path(analysis.__file__).parents[2] / "docs" / "results", []
    for folder in sorted(file.parent for file in results.glob("*/grid.json")):
        grid = read_result(folder / "grid.json", "")
        cells = read_cells(folder, grid)
        cells = analysis.in_pairs(cells[cells["status"] != "failed"], read_tables(grid).tasks)
        wide = analysis.scores(cells, f"{measure}@matched")
        arms = [arm for arm in wide if wide[arm].notna().any()]
        gaps = [(wide[arm] - wide[other]).dropna() for i, arm in enumerate(arms) for other in arms[:i]]
        found = components([gap for gap in gaps if len(gap)]) if len(gaps) > 1 else None
        if found is not None:
            studies.append((found.task, found.seed, found.row, found.rest))
    found = Components(*(float(value) for value in np.mean(studies, axis=0)))
    assert str(found) == str(MEASURED[measure])


# -- dry runs ---------------------------------------------------------------------------------------------------------


class Rows:
    """A context of tasks with 200 test rows and 64 neutral ones."""

    neutral = range(64), range(64)

    @staticmethod
    def splits(task: object) -> SimpleNamespace:
        return SimpleNamespace(test=range(200))


def noisy(arm: str, task: int, seed: int, kl: float) -> np.ndarray:
    """Scores of 30 answers, of which the better arm's vary from task to task."""
    rng = np.random.default_rng([task, seed, *map(ord, arm)])
    return 0.4 + 0.1 * task * (arm == BETTER) + rng.normal(0, 0.2, 30)


def test_a_dry_run_says_what_can_be_seen_and_what_more_would_buy(tmp_path: Path) -> None:
    grid, records = Made().run(noisy)
    lines = "\n".join(resolution(grid, Rows(), tmp_path, minutes=2.0, more_rows=1.25))  # pyright: ignore[reportArgumentType]
    assert "4 tasks x 2 seeds x 16 rows" in lines, "as many answers as the grid generates"
    parts, design = MEASURED["behaviour"], Design(4, 2, 16)
    seen = {sample: f"{detectable(parts, design, sample):.3f}" for sample in (True, False)}
    assert f"a difference of {seen[True]} for other tasks like these, {seen[False]} for these tasks alone." in lines
    assert f"{parts} (defaults, measured by behaviour at matched KL on the studies of docs/results)" in lines
    more = {name: f"{detectable(parts, one, sample=True):.3f}" for name, one in larger(design).items()}
    minutes = {"one more task": 2 * 4 * 2, "twice the rows": 0.5 * 4 * 2 * 4, "one more seed": 2 * 4 * 4}
    for name, cost in minutes.items():
        assert re.search(rf"With {name}: {more[name]} for other tasks like these, .* about {cost:.0f} more", lines)
    assert "Add tasks and rows before seeds: one more task helps most" in lines
    # cells that ran say how much differences vary
    for cell, record in zip(grid.cells(), records, strict=True):
        (tmp_path / cell.path).mkdir(parents=True)
        record.write(tmp_path / cell.path / "cell.json")
    lines = "\n".join(resolution(grid, Rows(), tmp_path, minutes=2.0, more_rows=1.25))  # pyright: ignore[reportArgumentType]
    assert "from the 32 cells that ran" in lines and seen[True] not in lines
    task, rest = (float(re.search(rf"{name} ([\d.]+)", lines)[1]) for name in ("source: task", "rest"))
    # one of two arms differs from task to task by .129, and two values of .2 make one of .283
    assert task == pytest.approx(0.129 / 2**0.5, abs=0.03) and rest == pytest.approx(0.283, abs=0.03)


def test_a_measure_that_no_study_knows_is_not_guessed(tmp_path: Path) -> None:
    grid, _ = Made(claim={"measure": "margin_per_token"}).run(noisy)
    lines = resolution(grid, Rows(), tmp_path, minutes=2.0, more_rows=1.25)  # pyright: ignore[reportArgumentType]
    assert "not known for this measure before two tasks have two seeds" in lines[-1] and len(lines) == 2
