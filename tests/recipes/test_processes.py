"""What a launcher was asked for against what runs, and the configurations that are shipped."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from steertune.recipes import config
from steertune.recipes.lab import processes
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.paths import LAUNCHES
from steertune.recipes.lab.quiet import quiet

NAMES = ["single_gpu", "multi_gpu", "fsdp1", "fsdp2", "zero1", "zero2", "zero3"]
NAMES += ["cpu", "cpu_ddp", "cpu_zero1", "cpu_zero2", "cpu_zero3"]
# one write a process: they share the pipe, and `print` writes words and ends apart
SAYS = """
import os
from accelerate import PartialState
from steertune.recipes.lab.processes import begin
begin()
os.write(1, f"ran {PartialState().num_processes}\\n".encode())
"""


@pytest.mark.parametrize("name", NAMES)
def test_configurations_are_read_by_accelerate(name, capsys):
    assert config.main([name]) == 0
    file = Path(capsys.readouterr().out.strip())
    read = load_config_from_file(str(file))
    kind = {"zero": "DEEPSPEED", "fsdp": "FSDP"}.get(name.removeprefix("cpu_")[:4])
    expected = kind or ("MULTI_GPU" if name in ("multi_gpu", "cpu_ddp") else "NO")
    assert read.distributed_type == expected
    assert read.num_processes == (1 if expected == "NO" else 2 if name.startswith("cpu") else 8)
    assert read.mixed_precision == "no"  # the training arguments decide
    if kind == "DEEPSPEED":
        assert read.deepspeed_config["zero_stage"] == int(name[-1])
    assert {f.stem for f in LAUNCHES.glob("*.yaml")} == set(NAMES)


def test_names_are_listed_and_misspelt_ones_are_answered(capsys):
    assert config.main([]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == sorted(NAMES)
    assert config.main(["zero_2"]) == 2
    assert "Did you mean" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["--num_processes", "3", "--cpu", "train.py", "--num_processes", "9"], 3),
        (
            ["--config_file", str(LAUNCHES / "cpu_ddp.yaml"), "-m", "steertune.recipes.train", "vector_dpo"],
            2,
        ),
        (["--config_file", str(LAUNCHES / "zero3.yaml"), "--num_processes=4", "train.py"], 4),
        (["train.py", "--output.folder", "x"], None),
    ],
)
def test_what_a_command_line_asks_for(words, count, monkeypatch):
    monkeypatch.setattr(processes, "default_config_file", "/nowhere")
    assert processes.asked_for(words) == count


def test_fewer_processes_than_asked_for_are_refused(monkeypatch, capsys):
    before = torch.get_num_threads()
    monkeypatch.setattr(processes, "launcher", lambda: ({}, ["--num_processes", "2", "--cpu", "x.py"]))
    with pytest.raises(ArmError, match="2 processes were requested, but 1 run.*cpu_ddp"):
        processes.begin()
    processes.begin(threads=before, running=2)  # side by side
    with pytest.raises(ArmError, match="work for one"):
        processes.begin(running=2, only_one=True)
    monkeypatch.setattr(processes, "launcher", lambda: None)
    processes.begin(threads=before)
    assert torch.get_num_threads() == before


def test_fsdp_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ArmError, match="accelerate would run DDP"):
        processes.begin(threads=torch.get_num_threads())


def launch(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "says.py"
    script.write_text(SAYS)
    command = [sys.executable, "-m", "accelerate.commands.launch", *words, str(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_silent_single_process_is_caught(tmp_path):
    ran = launch(tmp_path, "--num_processes", "2", "--cpu")
    assert ran.returncode != 0 and "2 processes were requested, but 1 run" in ran.stderr


@pytest.mark.slow
def test_two_processes_run_with_the_configuration_for_cpus(tmp_path):
    ran = launch(tmp_path, "--config_file", str(LAUNCHES / "cpu_ddp.yaml"))
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.count("ran 2") == 2
    assert ran.stderr.count("2 processes (MULTI_CPU, cpu)") + ran.stderr.count("2 processes (MULTI_GPU, cpu)") == 1


def test_threads_follow_omp_num_threads_else_the_cores_that_may_be_used(monkeypatch):
    cores = processes.os.sched_getaffinity(0)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert processes.default_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert processes.default_threads() == len(cores)
    assert processes.default_threads(running=2 * len(cores)) == 1


def test_the_one_thread_of_accelerate_launch_is_nobodys_choice(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what accelerate gives to every process that it starts
    cores = len(processes.os.sched_getaffinity(0))
    assert processes.default_threads(({}, ["train.py"])) == cores
    assert processes.default_threads(({"OMP_NUM_THREADS": "1"}, ["train.py"])) == 1
    assert processes.default_threads(({}, ["--num_cpu_threads_per_process", "5", "train.py"])) == 5


def test_begin_sets_the_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(processes, "launcher", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    processes.begin()
    assert torch.get_num_threads() == 2
    processes.begin(threads=before)
    assert torch.get_num_threads() == before


def test_only_the_named_warnings_are_silenced():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet()
        quiet()
        for module in ("transformers.training_args", "somewhere"):
            text = "`gradient_checkpointing` is deprecated and will be removed"
            warnings.warn_explicit(text, FutureWarning, "file.py", 1, module)
        warnings.warn_explicit("another", FutureWarning, "file.py", 2, "transformers.training_args")
    assert [str(warning.message)[:8] for warning in caught] == ["`gradien", "another"]
    assert len({*logging.getLogger("DeepSpeed").filters}) == len(logging.getLogger("DeepSpeed").filters)
