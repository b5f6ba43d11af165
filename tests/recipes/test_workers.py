"""Workers share the cells of a grid; one that dies loses a cell at most."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_grids import assert_alike, make_tables, read, results, run, toml

import steertune.recipes.ablate as recipe
from steertune.recipes.ablation.grid import make_grid
from steertune.recipes.ablation.workers import Workers, engine_of, engines, run_workers
from steertune.recipes.lab.rows import Record


def short_lived(cells, folder, plans):
    """An engine whose copies finish these cells and end; a plan is what one round of workers does: title -> failed."""
    rounds = iter(plans)

    class Made(Workers):
        started = 0

        def __init__(self, command, count, threads, logs):
            type(self).started += 1
            self.left = list(next(rounds))

        def running(self):
            if not self.left:
                return 0
            index, failed = self.left.pop()
            cell = cells[index]
            home = folder / cell.path
            home.mkdir(parents=True, exist_ok=True)
            if failed:
                (home / "failed.json").write_text(json.dumps({"error": "out of memory"}))
            else:
                keys = {"arm": cell.arm.name, "task": cell.task.label, "examples": cell.examples, "seed": cell.seed}
                Record(keys, {}, {"key": cell.key, "status": "ok"}).write(home / "cell.json")
            return 1

        def stop(self):
            pass

    return Made


@pytest.mark.parametrize(
    ("plans", "started", "unfinished"),
    [
        ([[(0, False), (1, False), (2, False)]], 1, []),
        ([[(0, False)], [(1, False), (2, False)]], 2, []),  # workers that died are replaced
        ([[(0, False), (1, True), (2, False)]], 1, [1]),  # a failed cell is not tried again in this run
        ([[(0, False)], []], 2, [1, 2]),  # workers that finish nothing are not started for ever
    ],
)
def test_workers_are_started_while_they_get_on(plans, started, unfinished, tmp_path, monkeypatch):
    monkeypatch.setattr("steertune.recipes.ablation.workers._POLL", 0.0)
    cells = make_grid(make_tables(tmp_path)).cells()[:3]
    folder = tmp_path / "run"
    engine = short_lived(cells, folder, plans)
    left = run_workers(engine, ["command"], 2, 1, cells, folder)
    assert engine.started == started and left == [cells[i].title for i in unfinished]


def test_a_worker_runs_the_same_command_without_the_workers(tmp_path):
    words = ["quick", "--workers", "4", "--engine=ray", "--reuse", "other", "--threads", "8", "--folder=x"]
    command = recipe.worker_command(words, tmp_path, 2)
    assert command == [
        sys.executable, "-m", "steertune.recipes.ablate", "quick", "--reuse", "other",
        "--folder", str(tmp_path), "--threads", "2",
    ]  # fmt: skip


def test_engines_are_files():
    assert engines() == ["local", "ray"] and all(issubclass(engine_of(name), Workers) for name in engines())
    with pytest.raises(ValueError, match="did you mean|Did you mean"):
        engine_of("locl")


def kill_one_worker_once_a_cell_is_done(folder: Path) -> psutil.Process:
    """Wait for the first cell, and kill the youngest process that runs a worker."""
    deadline = time.monotonic() + 300
    while not list(folder.rglob("cell.json")):
        assert time.monotonic() < deadline, "no cell was finished"
        time.sleep(0.05)
    [victim, *_] = [
        process
        for process in psutil.process_iter()
        if str(folder) in " ".join(process.cmdline()) and "--workers" not in process.cmdline()
    ]
    victim.kill()
    return victim


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_two_workers_of_which_one_is_killed_come_to_the_results_of_one_process(engine, tmp_path):
    if engine == "ray":
        pytest.importorskip("ray")
    tables = make_tables(tmp_path)
    file, folder = tmp_path / "grid.toml", tmp_path / "run"
    file.write_text(toml(tables))
    command = ["ablate", str(file), "--folder", str(folder), "--threads", "1", "--workers", "2", "--engine", engine]
    started = psutil.Popen([sys.executable, "-m", "steertune.recipes.cli", *command])
    kill_one_worker_once_a_cell_is_done(folder)
    assert started.wait(timeout=600) == 0
    assert {file.name for file in (folder / "workers").iterdir()} == {"0.log", "1.log"}
    assert_alike(results(read(make_grid(tables), folder)), results(run(tables, tmp_path / "alone")))
