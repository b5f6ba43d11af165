"""The grid runner on a tiny model: every cell once, fair, resumable, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from filelock import FileLock
from tiny_grids import assert_alike, make_tables, read, read_all, results, run, toml

import steertune.recipes.ablate as recipe
import steertune.recipes.ablation.run as cell_module
from steertune.adapters import directions
from steertune.recipes.ablation.cells import read_cells
from steertune.recipes.ablation.context import Context
from steertune.recipes.ablation.grid import make_grid
from steertune.recipes.ablation.plan import estimate
from steertune.recipes.ablation.store import Reusable, Store
from steertune.recipes.lab.arm_files import ARMS as ARMS_FOLDER
from steertune.recipes.lab.files import ArmError, read_result
from steertune.recipes.lab.progress import Bar
from steertune.recipes.lab.rows import FORMAT, Record, at_kl

DEEP = ("beft_dpo", "lora_layer_dpo")  # name layer 15
ARMS = ["form=lora,init=-", "form=bias,init=zeros", "form=bias,init=mean_difference", "mean_difference", "base"]


@pytest.fixture
def tables(tmp_path: Path) -> dict:
    """The grid's tables, with its model and data in `tmp_path`."""
    return make_tables(tmp_path)


class Whole(NamedTuple):
    """A grid that ran to its end: its tables, folder and cells, and seed, prompts and steps of every training."""

    tables: dict
    folder: Path
    cells: list[dict]
    trainings: list[tuple]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    """The grid of `tables`, run once for all tests that only look at it."""
    home, trainings, original = tmp_path_factory.mktemp("grid"), [], cell_module.make_trainer

    def spy(training, *args, **settings):
        trainings.append((training.seed, tuple(training.rows["prompt"]), training.arm.trainer["max_steps"]))
        return original(training, *args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cell_module, "make_trainer", spy)
        tables = make_tables(home)
        return Whole(tables, home / "run", run(tables, home / "run"), trainings)


def test_every_cell_is_there_and_whole(whole):
    cells = whole.cells
    assert [cell["arm"] for cell in cells] == 2 * ARMS
    for cell in cells:
        assert cell["status"] == "ok", cell["error"]
        # a vector of zeros has no strength at which it does anything
        assert cell["scalable"] == (cell["arm"] != "base")
        assert len(cell["margins"]) == 6
        assert cell["accuracy"] == pytest.approx(sum((m > 0) + (m == 0) / 2 for m in cell["margins"]) / 6)
        assert 0 <= cell["behaviour"] <= 1
        assert cell["judgements_failed"] == 0
        if cell["arm"] == "base":
            assert cell["margin_gain"] == pytest.approx(0, abs=1e-5)
            assert cell["matched_strength"] is None
        else:
            assert cell["kl"] > 0
            if cell["matched_strength"] is not None:
                assert len(cell["matched_margins"]) == 6
    assert not list(whole.folder.rglob("checkpoints"))


def test_arms_of_a_seed_train_on_the_same_rows_in_the_same_order(whole):
    by_seed = {seed: {rows for s, rows, _ in whole.trainings if s == seed} for seed in (0, 1)}
    assert all(len(rows) == 1 for rows in by_seed.values()), "an arm saw other rows"
    assert by_seed[0] != by_seed[1]
    assert {steps for *_, steps in whole.trainings} == {0, 2}


def test_tuning_reads_validation_rows_only_and_test_rows_are_read_once(tables, tmp_path, monkeypatch):
    grid = make_grid(tables)
    context = Context(grid)
    splits = context.splits(grid.tasks[0])
    names = {tuple(splits.validation["prompt"]): "validation", tuple(splits.test["prompt"]): "test"}
    read_splits: list[str] = []
    original = cell_module.evaluate

    def spy(model, held_out, *args, **options):
        read_splits.append(names[tuple(held_out.pairs["prompt"])])
        return original(model, held_out, *args, **options)

    monkeypatch.setattr(cell_module, "evaluate", spy)
    cells = grid.cells()
    recipe.run(cells[:1], context, tmp_path / "run", show=False)
    assert read_splits == ["validation", "validation", "test"]  # two trials, then the cell


def test_the_best_trial_is_taken_and_shared_by_the_seeds(whole):
    for cell in whole.cells:
        best = max(cell["tuning"], key=lambda trial: trial["score"])
        assert cell["setting"] == {k: best[k] for k in ("rate", "steps", "layer", "strength", "prompt")}
        [other] = [c for c in whole.cells if c["arm"] == cell["arm"] and c["seed"] != cell["seed"]]
        assert other["tuning"] == cell["tuning"]
        trained = cell["arm"] not in ("mean_difference", "base")
        count = 1 if cell["arm"] == "base" else 4
        assert len(cell["tuning"]) == count, "two trials at two strengths, or four strengths for an untrained arm"
        assert {t["steps"] for t in cell["tuning"]} == ({2} if trained else {0})


def test_the_best_trial_is_neither_trained_nor_searched_again_and_is_the_same(tables, tmp_path, monkeypatch):
    tables |= {"seeds": [0], "design": {"kind": "arms"}, "factors": {}, "arms": ["vector_dpo", "lora_dpo"]}
    tables |= {"claim": {"better": "vector_dpo", "than": "lora_dpo", "tasks": "fixed"}, "generations": 0}
    tables["budget"] |= {"strengths": "matched", "landings": 0}
    trained, searched = [], []
    make, search = cell_module.make_cell_trainer, cell_module.strengths_at
    monkeypatch.setattr(cell_module, "make_cell_trainer", lambda *args: trained.append(args[2]) or make(*args))

    def spy(*args, measured):
        before = len(measured)
        result = search(*args, measured=measured)
        searched.append((before, len(measured)))
        return result

    monkeypatch.setattr(cell_module, "strengths_at", spy)
    once = run(tables, tmp_path / "once")
    assert len(trained) == 4, "two trials of two arms"
    # a trial has measured nothing before; the cell starts from what its trial has measured
    assert [before > 0 for before, _ in searched] == [False, False, True] * 2
    # an interruption between tuning and cell loses the model, and changes nothing
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "once" / "tuning", tmp_path / "again" / "tuning")
    again = run(tables, tmp_path / "again")
    assert len(trained) == 6
    assert results(again) == results(once)


def test_matched_strengths_are_each_model_s_own_and_nothing_else_is_measured(tables, tmp_path):
    tables["budget"] |= {"strengths": "matched", "landings": 0}
    tables["seeds"] = [0]
    for cell in run(tables, tmp_path / "run"):
        scaled = cell["arm"] != "base"  # a vector of zeros has no strength at which it does anything
        trained = scaled and cell["arm"] != "mean_difference"
        assert len(cell["tuning"]) == (2 if trained else 1), "a trial is measured at one strength"
        assert (cell["matched_strength"] is not None) == scaled
        if scaled:
            [point, more] = cell["frontier"]
            assert point["kl"] == pytest.approx(1e-4, rel=0.1), "the KL the grid asks for"
            assert more["kl"] == pytest.approx(1e-3, rel=0.1) and more["strength"] > point["strength"]
            assert point["strength"] == cell["matched_strength"] == cell["tuned_strength"]
            assert 0 < cell["kl"] < 1e-3, "on other rows than those on which it was matched"
            assert all(cell["matched_" + name] == cell[name] for name in ("margins", "answers", "accuracy"))
        else:
            assert cell["setting"]["strength"] == 1.0


def test_answers_are_generated_at_the_kls_that_the_grid_names(tables, tmp_path):
    tables["budget"] |= {"strengths": "matched", "landings": 0}
    tables["matched"] |= {"answers": [1e-4]}
    for cell in run(tables | {"arms": [], "seeds": [0]}, tmp_path / "run"):
        assert cell["answers"] and cell["answers"] == cell["matched_answers"]
        record = Record.read(next((tmp_path / "run").glob(f"cells/**/{cell['arm']}/cell.json")))
        few, more = (record.observations[at_kl(kl)] for kl in (1e-4, 1e-3))
        assert few["answer"] and "answer" not in more and "neutral_answer" not in more
        assert {*few} - {*more} <= {"answer", "answer_cut", "score", "neutral_answer"}


def test_grids_without_named_kls_keep_their_keys(tables):
    plain = make_grid(tables)
    tables["matched"] |= {"answers": plain.tables.matched.targets}
    named = make_grid(tables)
    assert "answers" not in plain.tables.matched.key
    assert not {cell.key for cell in plain.cells()} & {cell.key for cell in named.cells()}
    tables["matched"] |= {"answers": [0.7]}
    with pytest.raises(ArmError, match=r"answers=\[0.7\] must be some of the KLs"):
        make_grid(tables)


@pytest.mark.slow
def test_trials_that_train_together_come_out_as_they_do_alone(tables, tmp_path, monkeypatch):
    seen = []
    original = cell_module.train_together
    monkeypatch.setattr(cell_module, "train_together", lambda made: seen.append(len(made)) or original(made))
    alone = run(tables, tmp_path / "alone")
    assert not seen, "on a CPU they train one by one"
    monkeypatch.setattr(
        cell_module, "_pays_together", lambda cell, context: cell.arm.arm.adapter["type"] == "steering_vector"
    )
    together = run(tables, tmp_path / "together")
    assert seen == [2, 2], "two trials, of two arms with a trained vector"
    for one, other in zip(together, alone, strict=True):
        assert_alike(one["tuning"], other["tuning"])


def test_an_interrupted_grid_goes_on_and_comes_out_the_same(tmp_path, whole):
    grid, folder = make_grid(whole.tables), tmp_path / "parts"
    cells = grid.cells()[: len(ARMS)]  # the first seed
    recipe.run(cells[:2], Context(grid), folder, show=False)
    stamps = {cell.path: (folder / cell.path / "cell.json").stat().st_mtime_ns for cell in cells[:2]}
    recipe.run(cells, Context(grid), folder, show=False)
    assert results(read_all(cells, folder)) == results(whole.cells[: len(ARMS)])
    for path, stamp in stamps.items():
        assert (folder / path / "cell.json").stat().st_mtime_ns == stamp, "a finished cell was run again"


@pytest.mark.slow
def test_two_runners_share_the_cells_and_one_of_them_may_be_killed(tables, tmp_path):
    file = tmp_path / "grid.toml"
    file.write_text(toml(tables))
    command = [sys.executable, "-m", "steertune.recipes.ablate", str(file), "--threads", "1"]
    command += ["--folder", str(tmp_path / "run")]
    first, second = (subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2))
    folder = tmp_path / "run"
    deadline = time.monotonic() + 120
    while not list(folder.rglob("cell.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.kill()
    output, _ = second.communicate(timeout=240)
    first.wait()
    assert second.returncode == 0, output.decode()
    grid = make_grid(tables)
    assert_alike(results(read(grid, folder)), results(run(tables, tmp_path / "alone")))


@pytest.mark.slow
def test_processes_of_one_launch_share_the_cells(tables, tmp_path):
    file = tmp_path / "grid.toml"
    file.write_text(toml(tables))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",  # without it accelerate runs one process on a machine without GPUs, and says nothing
        "--num_processes",
        "2",
        "-m",
        "steertune.recipes.ablate",
        str(file),
    ]
    done = subprocess.run(
        [*command, "--threads", "1", "--folder", str(tmp_path / "run")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("10 cells: 5 arms") == 1, "the plan is printed once"
    assert "on 2 process(es)" in done.stdout
    assert len(read(make_grid(tables), tmp_path / "run")) == 10


def test_a_launched_process_stands_alone():
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1",
                   "ACCELERATE_USE_FSDP": "true", "HOME": "kept"}  # fmt: skip
    assert recipe.stand_alone(environment) == (1, 2)
    assert environment == {"HOME": "kept"}
    assert recipe.stand_alone({}) == (0, 1)


def test_a_dry_run_says_what_it_would_cost_and_runs_nothing(tables, tmp_path, capsys):
    file = tmp_path / "grid.toml"
    file.write_text(toml(tables))
    assert recipe.main([str(file), "--folder", str(tmp_path / "run"), "--dry-run", "--threads", "1", "--json"]) == 0
    out, printed = capsys.readouterr()
    assert json.loads(out) == {"folder": str(tmp_path / "run"), "cells": 10, "done": 0, "failed": []}
    assert "10 cells: 5 arms x 1 tasks x 1 numbers of examples x 2 seeds; 0 are done." in printed
    assert all(f"min  task n=4 seed={seed} {arm}" in printed for arm in ARMS for seed in (0, 1))
    assert "2 x [2] steps, 2" in printed and "not trained" in printed
    assert "minutes on 1 process" in printed
    assert "2 pairs of task and seed give no p below 0.5: the claim cannot be decided." in printed
    assert "What the design can see (power 0.8 at alpha 0.05; held-out pair accuracy; 1 tasks x 2 seeds x 6" in printed
    assert "a difference of none for these tasks alone, none for other tasks like these." in printed
    assert not (tmp_path / "run").exists()


def test_a_scorer_that_cannot_be_fitted_ends_the_grid_before_it_starts(tables, tmp_path, capsys):
    tables["tasks"][0]["scorer"] = {"kind": "classifier"}  # from two rows
    file = tmp_path / "grid.toml"
    file.write_text(toml(tables))
    assert recipe.main([str(file), "--folder", str(tmp_path / "run"), "--threads", "1"]) == 2
    assert "splits.scorer=2: a classifier needs 8 rows or more" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_grid_that_tunes_once_does_so_on_its_first_task(tables, tmp_path):
    tables["tasks"].append(tables["tasks"][0] | {"label": "another", "draw": 1})
    tables["budget"]["per"] = "grid"
    cells = run(tables, tmp_path / "run")
    files = sorted((tmp_path / "run" / "tuning").rglob("*.json"))
    assert {file.parts[-4] for file in files} == {"task"}
    assert {file.stem for file in files} == {cell["arm"] for cell in cells}
    for arm in {cell["arm"] for cell in cells}:
        own = [cell for cell in cells if cell["arm"] == arm]
        assert len({json.dumps([cell["setting"], cell["tuning"]]) for cell in own}) == 1


def test_what_is_left_of_a_grid_is_estimated_from_what_ran(tables, tmp_path):
    """A cell that ran says what its siblings cost: with its tuning only where that is still to be done."""
    grid = make_grid(tables)
    context, cells = Context(grid), grid.cells()
    [first, second] = [cell for cell in cells if cell.arm.name == "form=bias,init=zeros"]
    before = estimate([first, second], context, tmp_path)
    assert before[first.path] > before[second.path] > 0, "the first seed tunes for both"
    home = tmp_path / first.path
    home.mkdir(parents=True)
    keys = {"arm": first.arm.name, "examples": first.examples, "seed": first.seed}
    facts = {"status": "ok", "key": first.key, "seconds": 30.0, "tuning_seconds": 20.0, "train_seconds": 4.0}
    known = CELL | keys | {"facts": facts}
    (home / "cell.json").write_text(json.dumps(known))
    assert estimate([second], context, tmp_path) == {second.path: 30.0}, "its tuning is not there"
    tuning = tmp_path / second.tuning_file
    tuning.parent.mkdir(parents=True)
    tuning.write_text("{}")
    assert estimate([second], context, tmp_path) == {second.path: 14.0}, "it trains for itself"


@pytest.mark.slow
def test_what_another_grid_holds_is_taken_over(tables, tmp_path, capsys):
    first = {**tables, "factors": {}, "design": {"kind": "arms"}, "seeds": [0]}
    first["arms"] = ["vector_dpo", "mean_difference"]
    first["claim"] = {"better": "vector_dpo", "than": "mean_difference"}
    known = run(first, tmp_path / "first")
    file, folder = tmp_path / "grid.toml", tmp_path / "second"
    file.write_text(toml(tables))
    command = [str(file), "--folder", str(folder), "--known", str(tmp_path / "first"), "--threads", "1"]
    assert recipe.main([*command, "--dry-run"]) == 0
    assert "2 cells can be reused" in capsys.readouterr().out and not folder.exists()
    grid = make_grid(tables)
    busy = next(cell for cell in grid.cells() if cell.arm.name == "mean_difference")
    (folder / busy.path).mkdir(parents=True)
    with FileLock(folder / busy.path / "cell.lock"):  # another runner is at it
        Reusable([tmp_path / "first"]).take(grid.cells(), folder)
        assert not (folder / busy.path / "cell.json").exists()
    Reusable([tmp_path / "first"]).take(grid.cells(), folder)
    taken = [cell for cell in grid.cells() if (folder / cell.path / "cell.json").exists()]
    assert [(cell.seed, cell.arm.name) for cell in taken] == [(0, "form=bias,init=zeros"), (0, "mean_difference")]
    assert len(list((folder / "tuning").rglob("*.json"))) == 2
    assert recipe.main(command) == 0
    cells = [cell for cell in read(grid, folder) if (cell["seed"], cell["arm"]) == (0, "form=bias,init=zeros")]
    assert cells[0].pop("taken_over") and "taken_over" not in known[0]
    assert results(cells) == results([known[0] | {"arm": "form=bias,init=zeros"}])
    every = [{k: v for k, v in cell.items() if k != "taken_over"} for cell in read(grid, folder)]
    assert results(every) == results(run(tables, tmp_path / "alone")), "as if nothing had been known"
    assert "--known KNOWN" in read_result(folder / "grid.json", "")["command"]


def test_a_folder_without_cells_is_not_known(tables, tmp_path, capsys):
    file = tmp_path / "grid.toml"
    file.write_text(toml(tables))
    assert recipe.main([str(file), "--folder", str(tmp_path / "run"), "--known", str(tmp_path / "nothing")]) == 2
    assert "it holds no cells" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_diverged_cell_is_a_result(tables, tmp_path):
    tables["factors"]["form"]["bias"] = {"trainer": {"learning_rate": 1e38}}
    tables["budget"] |= {"trials": 1, "steps": [4]}
    tables["seeds"] = [0]
    cells = run(tables, tmp_path / "run")
    diverged = [cell for cell in cells if cell["status"] == "diverged"]
    assert {cell["arm"] for cell in diverged} == {"form=bias,init=zeros", "form=bias,init=mean_difference"}
    frame = read_cells(tmp_path / "run")
    rows = frame[frame["status"] == "diverged"]
    assert (rows["accuracy@tuned"] == rows["accuracy@0"]).all() and (rows["margin_gain@tuned"] == 0).all()


def test_a_failed_cell_does_not_end_the_grid_and_is_tried_again(tables, tmp_path, monkeypatch):
    original = recipe.run_cell

    def fails_on_lora(cell, *args):
        if cell.arm.name.startswith("form=lora"):
            raise RuntimeError("out of memory")
        return original(cell, *args)

    monkeypatch.setattr(recipe, "run_cell", fails_on_lora)
    grid, start = make_grid(tables), time.time()
    cells = [cell for cell in grid.cells() if cell.arm.name.startswith(("form=lora", "base"))]
    failed = recipe.run(cells, Context(grid), tmp_path / "run", show=False)
    assert failed == [f"task n=4 seed={seed} form=lora,init=-" for seed in (0, 1)]
    assert list(read_cells(tmp_path / "run", grid.to_json())["status"]).count("failed") == 2
    # another runner of the same launch, which comes to the cell later, does not try it once more
    assert recipe._claimed(cells[0], Context(grid), tmp_path / "run", start, Bar(1)) == "failed"
    monkeypatch.undo()
    assert recipe.run(cells, Context(grid), tmp_path / "run", show=False) == []
    assert "failed" not in set(read_cells(tmp_path / "run", grid.to_json())["status"])


CELL = {
    "format": FORMAT, "task": "task", "arm": "a", "examples": 4, "seed": 0, "observations": {},
    "facts": {"status": "ok", "seconds": 1.0, "tuning_seconds": 0.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda cell: cell | {"format": 0}, "format 0"),
        (lambda cell: cell | {"facts": cell["facts"] | {"key": "other"}}, "other settings"),
        (lambda cell: [], "this is list"),
        (lambda cell: cell | {"seed": "0"}, "is not a record: seed='0'"),
    ],
)
def test_a_folder_with_other_cells_is_refused(damage, message, tables, tmp_path):
    grid = make_grid(tables)
    cell = grid.cells()[0]
    file = tmp_path / "run" / cell.path / "cell.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(damage({**CELL, "facts": CELL["facts"] | {"key": cell.key}})))
    with pytest.raises(ArmError, match=message):
        Store(tmp_path / "run").check(grid.cells())


def test_full_finetuning_has_no_strength_and_leaves_the_base_alone(tables, tmp_path):
    tables["arms"] = ["full_dpo", "base"]
    del tables["factors"]
    tables |= {
        "design": {"kind": "arms"},
        "claim": {"better": "full_dpo", "than": "base", "measure": "accuracy", "strength": "tuned"},
    }
    tables["card"]["affordances"] = {"*": "The same pairs."}
    grid = make_grid(tables)
    context = Context(grid)
    before = {name: value.clone() for name, value in context.model.state_dict().items()}
    recipe.run(grid.cells(), context, tmp_path / "run", show=False)
    for cell in read(grid, tmp_path / "run"):
        assert cell["status"] == "ok", cell["error"]
        assert not cell["scalable"] and cell["matched_strength"] is None and "matched_accuracy" not in cell
        assert {trial["strength"] for trial in cell["tuning"]} == {1.0}
    assert all(torch.equal(value, before[name]) for name, value in context.model.state_dict().items())


@pytest.mark.slow
def test_every_baseline_arm_runs(tables, tmp_path):
    """The arms of `recipes/configs/arms/`, on a model of four layers that cannot write a sentence."""
    loose = 'name = "rewrites"\noverlap = 0.0\nshortest = 0.0\nlongest = 99.0'
    changed = {**dict.fromkeys(DEEP, ("15", "2")), "lora_rewrites_dpo": ('name = "rewrites"', loose)}
    changed["vector_contrast_distillation"] = ("k = 4", "k = 3")  # of four pairs three are others
    tables["arms"] = sorted(file.stem for file in ARMS_FOLDER.glob("*.toml") if file.stem not in changed)
    for name, change in changed.items():
        file = tmp_path / f"{name}.toml"
        file.write_text((ARMS_FOLDER / file.name).read_text().replace(*change))
        tables["arms"].append(str(file))
    tables |= {"seeds": [0], "design": {"kind": "arms"}, "claim": {"better": "vector_dpo", "than": "lora_dpo"}}
    del tables["factors"]
    tables["budget"] |= {"trials": 1}
    tables["tasks"][0] |= {"instructions": ["the dog runs"], "instructions_by": "This test, in a minute."}
    cells = {cell["arm"]: cell for cell in run(tables, tmp_path / "run")}
    assert set(cells) == {Path(arm).stem for arm in tables["arms"]}
    for name, cell in cells.items():
        assert cell["status"] in ("ok", "unmatched"), (name, cell["error"])
        prompt = name.startswith("prompt_")
        untrained = prompt or name == "base" or name in directions.names()
        assert (cell["parameters"] == 0) == untrained and (cell["steps"] == 0) == untrained
        assert (abs(cell["margin_gain"]) > 1e-6) == (name != "base"), name
        assert cell["scalable"] == (name.startswith(("vector", "lora")) or (untrained and not prompt))
        assert (cell["prompt_tokens"] > 0) == prompt
        assert ("augmentation" in cell["notes"]) == (
            name in ("lora_templates_dpo", "lora_rewrites_dpo", "lora_perturbations_dpo")
        )


def test_a_task_says_how_its_behaviour_is_left_out_of_damage_and_a_swapped_one_does_not(tables, tmp_path):
    (tmp_path / "task" / "behaviour.toml").write_text(
        "[opposites]\npositive = 'Say cat.'\nnegative = 'No cat.'\n[undo]\npattern = ' cat'"
    )
    other = {**tables["tasks"][0], "label": "swapped", "reverse": True, "draw": 1}
    tables["tasks"].append(other)
    grid = make_grid(tables)
    own, swapped = map(Context(grid).held_out, grid.tasks)
    assert own.instruction == "Say cat." and own.undo is not None and own.undo("a Cat") == "a"
    assert (swapped.instruction, swapped.undo) == ("", None)
    keys = [cell.key for cell in grid.cells()]
    (tmp_path / "task" / "behaviour.toml").write_text("[undo]\npattern = ' dog'")
    assert keys != [cell.key for cell in make_grid(tables).cells()]


@pytest.mark.slow
def test_the_tuning_chooses_layers_and_lets_arms_be_used_as_they_were_trained(tables, tmp_path, monkeypatch):
    tables |= {
        "factors": {},
        "design": {"kind": "arms"},
        "seeds": [0],
        "arms": ["vector_dpo", "lora_dpo", "mean_difference"],
    }
    tables |= {"generations": 0, "questions": 0, "claim": {"better": "vector_dpo", "than": "lora_dpo"}}
    # at low learning rates an adapter must be scaled up to reach the KL
    tables["budget"] = {"trials": 4, "learning_rate": [1, 2], "steps": [2], "layers": [0.0001, 0.75]}
    trained, make = [], cell_module.make_cell_trainer

    def spy(cell, context, setting, *rest):
        made = make(cell, context, setting, *rest)
        trained.append((cell.arm.name, setting, made[0].model.active_peft_config.to_dict().get("layers")))
        return made

    monkeypatch.setattr(cell_module, "make_cell_trainer", spy)
    vector, lora, closed = run(tables, tmp_path / "run")
    assert [(t["layer"], t["rate"]) for t in vector["tuning"][:4]] == [
        (0.0001, 1), (0.0001, 2), (0.75, 1), (0.75, 2)
    ]  # fmt: skip
    # without a layer to choose: as many trials, between the same ends
    assert [t["rate"] for t in lora["tuning"][:4]] == pytest.approx(np.geomspace(1, 2, 4))
    assert {t["layer"] for t in lora["tuning"]} == {None}
    assert [(t["layer"], t["steps"]) for t in closed["tuning"]] == [(0.0001, 0), (0.75, 0)], "no step, so no rate"
    assert closed["setting"]["layer"] == max(closed["tuning"], key=lambda t: t["score"])["layer"]
    # every training stood at the layer of its setting
    layers = {(setting.layer, *layers) for arm, setting, layers in trained if arm == "vector_dpo"}
    assert layers == {(0.0001, 0), (0.75, 3)}
    for cell in (vector, lora):
        *drawn, landing = cell["tuning"]
        best = max(drawn, key=lambda t: (t["matched"], t["landed"], t["score"]))
        assert best["matched"] and best["strength"] > 0 and best["landed"] < 1
        assert landing["rate"] == pytest.approx(best["rate"] * best["strength"] * 10**0.25), "for KLs of 1e-4 and 1e-3"
        assert landing["landed"] == 1 and cell["setting"]["rate"] == landing["rate"]
        assert all(0.5 <= point["strength"] <= 2 for point in cell["frontier"])
