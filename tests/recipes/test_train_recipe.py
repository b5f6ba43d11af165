"""The train recipe on a tiny local model: what it leaves behind, that it goes on after a kill, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_data
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import tiny

import steertune.recipes.train as recipe
from steertune.adapters.description import read_description
from steertune.recipes.lab.arm import load_arm
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.rows import Record

LEFT_BEHIND = ["adapter", "charts", "config.json", "metrics.jsonl", "page.html", "page.md", "result.json", "tables"]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Overrides: a tiny local model and local pairs, six steps, a checkpoint every second one."""
    steps = {"trainer.max_steps": 6, "trainer.save_steps": 2}
    options = {"model.threads": 1, "evaluation.new_tokens": 4, **steps}
    return tiny_data.save_run(tmp_path, 8, options, max_position_embeddings=512)


def test_it_leaves_everything_behind(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe.main(["vector_dpo", *words]) == 0
    run = tmp_path / "run"
    assert [name for name in LEFT_BEHIND if not (run / name).exists()] == []
    record = Record.read(run / "result.json")
    assert sorted(record.observations, key=float) == ["-1", "0", "0.5", "1", "2"]
    assert record.facts["parameters"] == 32
    assert record.value("kl", 1) > 0
    values = read_description(run / "adapter")
    assert values is not None and values["data"]["examples"] == 8 and values["data"]["name"] == tmp_path.name
    assert values["strength"]["measured"]["1"]["kl"] == pytest.approx(record.value("kl", 1))
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 6
    printed = capsys.readouterr().out
    assert "minutes" in printed.split("# vector_dpo")[0], "the plan comes first"
    assert "PeftModel.from_pretrained" in printed
    # the command on the page loads what was evaluated
    model = PeftModel.from_pretrained(tiny(max_position_embeddings=512), run / "adapter")
    ids = torch.tensor([[3, 4, 5]])
    with model.disable_adapter():
        base = model(ids).logits
    assert not torch.equal(model(ids).logits, base)


def test_a_finished_or_foreign_folder_is_refused(words: list[str], tmp_path: Path) -> None:
    recipe.run(load_arm("vector_dpo", words))
    with pytest.raises(ArmError, match="finished run"):
        recipe.run(load_arm("vector_dpo", words))
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(ArmError, match="another arm"):
        recipe.run(load_arm("vector_dpo", [*words, "--loss.beta=0.2"]))
    assert recipe.main(["vector_dpo", *words, "--loss.beta=0.2"]) == 2


def test_an_interrupted_run_ends_as_the_straight_one(words: list[str], tmp_path: Path) -> None:
    straight = [word.replace("/run", "/straight") for word in words]
    recipe.run(load_arm("vector_dpo", straight))
    command = [sys.executable, "-m", "steertune.recipes.train", "vector_dpo", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    if not (tmp_path / "run" / "result.json").exists():  # killed before its end, as meant
        recipe.run(load_arm("vector_dpo", words))
    adapters = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "straight")]
    for key, value in adapters[1].items():
        assert torch.equal(value, adapters[0][key])


def test_untrained_and_full_finetuning_and_demonstrations(words: list[str], tmp_path: Path) -> None:
    def run(name: str, arm: str, *more: str) -> Record:
        return recipe.run(load_arm(arm, [*words, f"--output.folder={tmp_path / name}", *more]))

    untrained = run("untrained", "mean_difference", "--trainer.max_steps=0")
    assert untrained.facts["steps"] == 0
    assert untrained.value("kl", 1) > 0
    full = run("full", "vector_dpo", "--adapter={type='none'}", "--trainer.learning_rate=1e-3",
                "--trainer.max_steps=2",
               "--trainer.precompute_ref_log_probs=false")  # fmt: skip
    assert [*full.observations] == ["0", "1"], "full finetuning has no strength"
    tiny_data.save_task(tmp_path, train=tiny_data.demonstrations(seed=0), test=tiny_data.demonstrations(seed=1))
    arm = ["--loss={name='cross_entropy'}", "--trainer={max_steps=2}"]
    shown = run("demonstrations", "vector_ce", *arm)
    assert "accuracy" not in shown.means()["1"]
    assert any(shown.observations["1"]["answer"])


def test_accelerate_launches_it_as_a_script(words: list[str], tmp_path: Path) -> None:
    script = Path(recipe.__file__)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    command = [*launch, str(script), "vector_dpo", *words, "--trainer.max_steps=2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "page.md").is_file()
