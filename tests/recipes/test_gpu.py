"""The script for a machine with a GPU runs where there is none, and says what failed."""

from __future__ import annotations

import json
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from steertune.recipes import cli
from steertune.recipes.lab.paths import RECIPES
from steertune.recipes.studies import gpu
from steertune.recipes.studies.device import checks
from steertune.recipes.studies.device.steps import Timing
from steertune.recipes.studies.device.world import NotRun, World, tokenizer
from steertune.recipes.studies.timing.rows import random_words

SCRIPT = RECIPES / "studies" / "gpu.sh"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World.make(tiny=True, folder=tmp_path_factory.mktemp("gpu"))


@pytest.mark.parametrize("name", ["steering in 32 and 16 bits", "sharded weights", "the server's engine"])
def test_checks_pass_without_a_gpu(name, world):
    assert checks.CHECKS[name](world)


def test_a_check_that_sees_a_difference_fails(world, monkeypatch):
    """The device's model gets other weights than the CPU's."""
    small, turn = World.small, iter(range(99))

    def other(self: World, *args, **options):
        model = small(self, *args, **options)
        with torch.no_grad():
            model.model.layers[4].mlp.down_proj.weight.add_(next(turn) % 2)
        return model

    monkeypatch.setattr(World, "small", other)
    with pytest.raises(AssertionError, match=r"bias in torch.float32: off by"):
        checks.equality(world)


def test_one_word_is_one_token():
    row = random_words(tokenizer(), "dpo", 24, 12, 3)[0]
    assert [len(tokenizer()(row[key])["input_ids"]) for key in ("prompt", "chosen", "rejected")] == [12, 11, 11]


def test_what_fails_is_noted_and_the_rest_goes_on(tmp_path):
    report = gpu.Report(tmp_path, tiny=True)
    report.run("bad", lambda: 1 / 0)

    def without() -> str:
        raise NotRun("no GPU")

    report.run("unneeded", without)
    report.run("good", lambda: "well")
    report.rate(100.0)
    half = 20.0e12
    report.steps([Timing("SFT: TRL + LoRA r8", "SFT", 1.0, half, 8.0), Timing("SFT: ours", "SFT", 0.25, half, 3.0)])
    page = (tmp_path / "table.md").read_text()
    assert report.failed == ["bad"] and "ZeroDivisionError" in page and "| good | passed |" in page
    assert "| SFT: ours | 0.2500 | 4.00 | 0.80 | 3.00 | 0.38 |" in page
    assert json.loads((tmp_path / "table.json").read_text())["checks"]["unneeded"]["outcome"] == "not run"


def test_without_a_gpu_the_command_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["gpu", "--folder", str(tmp_path)]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_the_wheels_are_the_versions_that_are_tested_here():
    pinned = dict(re.findall(r"([\w-]+)==([\d.]+)", SCRIPT.read_text(encoding="utf-8")))
    assert {"peft", "trl", "datasets", "pydantic"} <= {*pinned}
    assert {name: version(name) for name in pinned} == pinned


@pytest.mark.slow
def test_the_whole_script_runs_in_its_own_folder(tmp_path):
    """As on the machine: by its shell script, from elsewhere, without this installation's paths."""
    ran = subprocess.run(
        ["bash", str(SCRIPT), "--tiny", "--folder", str(tmp_path), "--seconds", "3000"],
        capture_output=True, text=True, cwd=tmp_path, env=_plain_environment(),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    results = json.loads((tmp_path / "table.json").read_text())
    assert {check["outcome"] for check in results["checks"].values()} == {"passed", "not run"}
    assert len(results["steps"]) == 6 and not results["unfinished"]


def _plain_environment() -> dict[str, str]:
    import os
    import sys

    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{kept['PATH']}"}
