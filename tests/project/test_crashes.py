"""kill -9 at random moments: the next start goes on, and ends as the run that was never interrupted, bit for bit.

A writer of the memo alone is killed in `test_prefix_memo.py`; here the memo is on while trainings are killed.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import crash_cases
import pytest
import torch
from broken_files import Trap, flip_last
from paths import HELPERS
from tiny_data import history, pairs, same, trained, trainer, values
from tiny_grids import make_tables

import steertune.recipes.ablation.run as cell_module
from steertune.recipes.ablation.context import Context
from steertune.recipes.ablation.grid import make_grid
from steertune.recipes.lab.files import read_result
from steertune.trainers import CheckpointError, FrozenPrefix, last_checkpoint

# a server without threads of its own, that has everything imported: a start costs a fork
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["crash_cases"])


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Path:
    """A folder with the grid's tables; the server's children find the modules of this folder."""
    here = str(HELPERS)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    )  # where it imports from
    monkeypatch.syspath_prepend(here)
    tables = make_tables(tmp_path)
    del tables["factors"], tables["base"]
    tables |= {"design": {"kind": "arms"}, "arms": ["mean_difference", "vector_dpo"]}
    tables["claim"] = {"better": "vector_dpo", "than": "mean_difference"}
    (tmp_path / "tables.json").write_text(json.dumps(tables))
    return tmp_path


def start(case: str, folder: Path, event: int | None = None) -> Any:
    """A process at its case's work."""
    started = PROCESSES.Event()
    process = PROCESSES.Process(target=crash_cases.run, args=(case, folder, event, started), daemon=True)
    process.start()
    assert started.wait(120), f"{case} did not start"
    return process


def killed(case: str, folder: Path, seconds: float, numbers: random.Random) -> bool:
    """Start a case and kill it: at a random moment, or before a random change to its folder. Whether it was killed."""
    at_event = numbers.random() < 0.5
    process = start(case, folder, numbers.randrange(1, 60) if at_event else None)
    process.join(120 if at_event else numbers.uniform(0.05, 0.9) * seconds)
    process.kill()
    process.join()
    return process.exitcode == -9


@pytest.mark.parametrize(
    ("case", "kills"),
    [
        ("training", 2),
        ("grid", 1),
        pytest.param("training", 12, marks=pytest.mark.slow),
        pytest.param("grid", 8, marks=pytest.mark.slow),
    ],
)
def test_what_is_killed_goes_on_and_ends_as_the_straight_run(case, kills, home):
    begun = time.monotonic()
    straight = start(case, home / "straight")
    straight.join(300)
    assert straight.exitcode == 0
    seconds, expected = time.monotonic() - begun, crash_cases.CASES[case].result(home / "straight")
    numbers, left, chain = random.Random(kills), kills, 0
    while left:
        folder = home / f"chain{chain}"
        while left and killed(case, folder, seconds, numbers):
            left -= 1
        ended = start(case, folder)
        ended.join(300)
        assert ended.exitcode == 0, "the next start did not come to its end"
        assert crash_cases.CASES[case].result(folder) == expected
        chain += 1
        assert chain < 10 * kills, "nothing was killed"


# -- half a checkpoint ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor], list[dict[str, float]]]:
    """The folder of a training of four steps with all its checkpoints, what it trained and what it logged."""
    folder = tmp_path_factory.mktemp("run")
    made = train(folder)
    return folder, values(made.model), history(made)


def train(folder: Path, **options: Any) -> Any:
    made = new(folder)
    made.train(**options)
    return made


def new(folder: Path) -> Any:
    return trainer("dpo", folder, data=pairs(16), loss="bipo", max_steps=4, save_strategy="steps", save_steps=1)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    """One bit of the largest tensor in a file of torch."""
    with zipfile.ZipFile(file) as archive:
        largest = max((archive.read(entry) for entry in archive.infolist()), key=len)
    data = bytearray(file.read_bytes())
    data[data.index(largest) + len(largest) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "without its state": (lambda f: (f / "trainer_state.json").unlink(), "has no trainer_state.json"),
    "half a state": (lambda f: cut(f / "trainer_state.json"), r"trainer_state\.json is damaged"),
    "an empty state": (lambda f: (f / "trainer_state.json").write_text(""), r"trainer_state\.json is damaged"),
    "another step's state": (
        lambda f: shutil.copy(f.parent / "checkpoint-2" / "trainer_state.json", f),
        "belongs to step 2, not to checkpoint-4",
    ),
    "half an adapter": (lambda f: cut(f / "adapter_model.safetensors"), r"adapter_model\.safetensors is damaged"),
    "an empty adapter": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "adapter_model.*is damaged"),
    "a flipped bit of the adapter": (
        lambda f: flip_last(f / "adapter_model.safetensors"),
        "was changed after it was written",
    ),
    "another learning rate in its state": (
        lambda f: (f / "trainer_state.json").write_text(
            (f / "trainer_state.json").read_text().replace("0.0", "0.1", 1)
        ),
        "was changed after it was written",
    ),
    "half an optimiser": (lambda f: cut(f / "optimizer.pt"), r"optimizer\.pt is damaged"),
    "a flipped bit of the optimiser": (lambda f: flip(f / "optimizer.pt"), r"optimizer\.pt is damaged"),
    "half a schedule": (lambda f: cut(f / "scheduler.pt"), r"scheduler\.pt is damaged"),
    "half the random numbers": (lambda f: cut(f / "rng_state.pth"), r"rng_state\.pth is damaged"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(damage, message, run, tmp_path, caplog):
    folder, straight, logged = run
    shutil.copytree(folder, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoint-4")
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-3")
    assert caplog.text.count("checkpoint-4") and "Looking for an earlier checkpoint" in caplog.text
    with pytest.raises(CheckpointError, match=message):
        new(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    made = train(tmp_path / "run", resume_from_checkpoint=True)
    assert same(values(made.model), straight)
    assert [e for e in history(made) if "loss" in e] == [e for e in logged if "loss" in e]


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_a_finished_training_is_not_trained_further(kind, tmp_path):
    """As it stands after a kill between the last checkpoint and the end. Four steps of an epoch of eight."""

    def made():
        loss = "bipo" if kind == "dpo" else None
        data = None if kind == "sft" else pairs(16)
        return trainer(kind, tmp_path, data=data, loss=loss, max_steps=4, save_strategy="steps", save_steps=1,
                       per_device_train_batch_size=2)  # fmt: skip

    first, again = made(), made()
    first.train()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert same(values(again.model), values(first.model))
    assert [e for e in history(again) if "loss" in e] == [e for e in history(first) if "loss" in e]


def test_without_a_whole_checkpoint_it_is_said(run, tmp_path, caplog):
    assert last_checkpoint(tmp_path / "nowhere") is None and not caplog.text
    shutil.copytree(run[0], tmp_path / "run")
    for step in range(1, 5):
        cut(tmp_path / "run" / f"checkpoint-{step}" / "optimizer.pt")
    assert last_checkpoint(tmp_path / "run") is None
    assert "training starts from the beginning" in caplog.text
    with pytest.raises(CheckpointError, match="has no complete checkpoint. Leave resume_from_checkpoint out"):
        train(tmp_path / "run", resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="No checkpoint .*checkpoint-9"):
        train(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-9"))


def test_a_checkpoint_of_another_adapter_is_refused(run, tmp_path):
    from steertune.adapters import SteeringVectorConfig

    other = trainer("dpo", tmp_path, data=pairs(16), loss="dpo", peft_config=SteeringVectorConfig(layers=1))
    with pytest.raises(
        CheckpointError, match="does not belong to this training run: .* does not belong to an adapter on"
    ):
        other.train(resume_from_checkpoint=str(run[0] / "checkpoint-2"))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_runs_no_code(name, run, tmp_path):
    """The Trainer's own state files are pickles; it reads them as tensors and plain values only (`weights_only`)."""
    shutil.copytree(run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    torch.save({"trap": Trap(tmp_path / "sprung")}, tmp_path / "checkpoint-2" / name)
    if name == "training_args.bin":  # nobody reads it
        train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    else:
        with pytest.raises(Exception, match="(?i)weights.only|unsupported|GLOBAL"):
            train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not (tmp_path / "sprung").exists()


# -- half a tuning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"key": "KEY"}', '{"key": "KEY", "trials": []}'])
def test_a_damaged_tuning_is_tuned_again(text, home, caplog):
    grid = make_grid(json.loads((home / "tables.json").read_text()))
    [cell] = [cell for cell in grid.cells() if cell.arm.name == "mean_difference"][:1]
    context = Context(grid)
    folder = home / "run"
    known = cell_module.tuned(cell, context, folder)
    file = folder / cell.tuning_file
    file.write_text(text.replace("KEY", cell.tuning_key))
    with caplog.at_level(logging.WARNING):
        again = cell_module.tuned(cell, context, folder)
    assert again["trials"] == known["trials"] and read_result(file, "") == again
    assert str(file) in caplog.text


def test_a_training_with_a_memo_in_a_folder_equals_one_without(tmp_path):
    """What the killed trainings above are compared with is not wrong in the same way."""
    with_memo = trained("dpo", tmp_path, loss="bipo", frozen_prefix=FrozenPrefix(ram_gb=0, folder=tmp_path / "memo"))
    in_ram = trained("dpo", tmp_path, loss="bipo", frozen_prefix=FrozenPrefix())
    assert same(values(with_memo.model), values(in_ram.model))
