"""Recipes on two processes: the result of one at the same global batch, one writer, one progress bar."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_data
from launching import launch
from safetensors.torch import load_file

from steertune.recipes import distill, train

ROWS = 4  # of a step, over all processes
BARS = r"(Training|Distillation): started"
# two recipes in one launch; every process but the first may write nothing but its random state
SCRIPT = """
import os, sys
from steertune.recipes import distill, train
folder, words = sys.argv[1], sys.argv[2:]
def only_reads(event, args):
    if event == "open" and str(args[0]).startswith(folder) and args[2] & (os.O_WRONLY | os.O_RDWR):
        if "rng_state" not in str(args[0]):
            os.write(2, f"rank {os.environ['RANK']} writes {args[0]}\\n".encode())
            os._exit(9)
if os.environ["RANK"] != "0":
    sys.addaudithook(only_reads)
cut = words.index("distill")
sys.exit(train.main(words[:cut]) or distill.main(words[cut + 1 :]))
"""


def words(folder: Path, processes: int, run: str) -> list[str]:
    """Overrides: a tiny local model and local pairs, and this process's share of a step's rows."""
    options = {
        "model.name": folder / "model",
        "model.threads": 1,
        "data.name": folder,
        "data.train": 8,
        "data.test": 6,
        "trainer.max_steps": 4,
        "trainer.save_steps": 2,
        # accelerate fills up the last step of an epoch with rows of its beginning, one process has a smaller step
        "trainer.dataloader_drop_last": "true",
        "trainer.per_device_train_batch_size": ROWS // processes,
        "evaluation.new_tokens": 4,
        "evaluation.batch_size": 4,
        "output.folder": folder / str(processes) / run,
    }
    return [f"--{key}={value}" for key, value in options.items()]


def both(folder: Path, processes: int) -> list[str]:
    """The words of the two recipes."""
    prompt = ["--views.good.text=you stay now ", "--trainer.learning_rate=0.01"]
    distilled = ["vector_distillation", *words(folder, processes, "distill"), *prompt]
    return ["vector_dpo", *words(folder, processes, "train"), "distill", *distilled]


def differences(one: Any, two: Any, path: str = "") -> list[str]:
    """Where two results differ by more than 1e-5; times, memory and places may."""
    if path.rpartition(".")[2] in ("train_seconds", "total_seconds", "seconds", "peak_memory_gb", "processes", "use"):
        return []
    if isinstance(one, dict):
        pairs = [(one[key], two[key], f"{path}.{key}") for key in one] if one.keys() == two.keys() else []
        return [f for pair in pairs for f in differences(*pair)] if pairs or not one else [f"{path}: other keys"]
    if isinstance(one, list):
        pairs = [(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(one, two, strict=True))]
        return [f for pair in pairs for f in differences(*pair)]
    equal = one == pytest.approx(two, rel=1e-5, abs=1e-5) if isinstance(one, float) else one == two
    return [] if equal else [f"{path}: {one!r} and {two!r}"]


@pytest.mark.slow
def test_two_processes_train_and_distil_as_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny_data.save_model(tmp_path / "model", max_position_embeddings=512, vocab_size=22)
    tiny_data.save_task(tmp_path, train=tiny_data.pairs(8, 5), test=tiny_data.pairs(8, 4))
    (tmp_path / "both.py").write_text(SCRIPT)
    done = launch("cpu_ddp", str(tmp_path / "both.py"), str(tmp_path), *both(tmp_path, 2))
    assert done.returncode == 0, done.stderr[-3000:]
    capfd.readouterr()
    alone = both(tmp_path, 1)
    cut = alone.index("distill")
    assert (train.main(alone[:cut]), distill.main(alone[cut + 1 :])) == (0, 0)
    printed = capfd.readouterr()

    for run in ("train", "distill"):
        one, two = (tmp_path / str(processes) / run for processes in (1, 2))
        results = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
        for result in results:
            del result["checksum"]
        assert differences(*results) == [], run
        adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two)]
        for name, value in adapters[0].items():
            assert value.abs().max() > 1e-3
            assert float((value - adapters[1][name]).abs().max()) < 1e-5
        files = [{str(f.relative_to(folder)) for f in folder.rglob("*")} for folder in (one, two)]
        assert {f for f in files[0] ^ files[1] if "rng_state" not in f} == set()
    assert results[0]["facts"]["train_prompts"] > 0
    # one plan, one page, and every bar once
    for text in ("minutes: training", "This page:"):
        assert done.stdout.count(text) == printed.out.count(text) > 0
    assert sorted(re.findall(BARS, done.stderr)) == sorted(re.findall(BARS, printed.err)) != []


def test_a_planted_difference_is_seen() -> None:
    one = {"a": [{"kl": 0.1, "seconds": 1.0}], "b": "text"}
    assert differences(one, {"a": [{"kl": 0.1000001, "seconds": 2.0}], "b": "text"}) == []
    assert len(differences(one, {"a": [{"kl": 0.1001, "seconds": 1.0}], "b": "other"})) == 2
    assert differences(one, {"a": [{"kl": 0.1, "seconds": 1.0}]}) == [": other keys"]
