"""Two processes do what one does: DDP, FSDP2 and ZeRO, without a GPU; and what is saved is whole."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import distributed_cases
import pytest
import tiny_data
import torch
from launching import launch
from safetensors.torch import load_file, save_file
from tiny_models import steered, tiny
from transformers import Trainer

from steertune.trainers import CheckpointError
from steertune.trainers.checkpoints import IncompleteAdapterError, check_processes, check_saved

TOLERANCE = 1e-5
# TRL's own numbers count the rows that fill up the last batch; these are the trainers' and ours
MEASURED = ("eval eval_loss", "eval eval_margin", "eval eval_margin_gain", "eval eval_pair_accuracy")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the cases, and what one process does."""
    folder = tmp_path_factory.mktemp("distributed")
    distributed_cases.prepare(folder)
    distributed_cases.run(folder, "alone")
    return folder, json.loads((folder / "alone-0.json").read_text())


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """What is not equal within `TOLERANCE`, of weights, training losses and evaluation."""
    found = []
    for key in one:
        if key == "logged" or (key.startswith("step ") and key.split(" ")[2] not in ("loss", "margin", "grad_norm")):
            continue
        if key == "skipped" or (key.startswith("eval ") and key not in MEASURED):
            continue
        first, second = (torch.tensor(x[key], dtype=torch.float64) for x in (one, two))
        if not torch.allclose(first, second, rtol=TOLERANCE, atol=TOLERANCE):
            found.append(f"{key}: {float((first - second).abs().max()):.2g}")
    return found


def compare(folder: Path, one: dict[str, Any], mode: str, few: bool = False) -> list[str]:
    """Every case that went wrong, of both processes."""
    wrong = []
    for rank in (0, 1):
        two = json.loads((folder / f"{mode}-{rank}.json").read_text())
        assert set(distributed_cases.cases(mode, few)) <= set(two)
        for case, seen in two.items():
            if case.startswith("resume"):
                ok = seen["bit-equal"] and seen["moved"] > 0
                wrong += [] if ok else [f"{mode} {rank} {case}: {seen}"]
            elif case in one:
                wrong += [f"{mode} {rank} {case}: {each}" for each in differences(one[case], seen)]
    return wrong


def weights(one: dict[str, Any]) -> dict[str, Any]:
    """Those that the case which is resumed ends with."""
    return {k: v for k, v in one[distributed_cases.RESUMED[0]].items() if k.startswith("weight")}


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ddp_and_fsdp2_equal_one_process(alone: tuple[Path, dict[str, Any]], few: bool) -> None:
    folder, one = alone
    modes = [f"{mode}:few" if few else mode for mode in ("ddp", "fsdp2")]
    done = launch("cpu_ddp", distributed_cases.__file__, str(folder), *modes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert compare(folder, one, "ddp", few) + compare(folder, one, "fsdp2", few) == []
    ddp, fsdp2 = (json.loads((folder / f"{mode}-1.json").read_text()) for mode in ("ddp", "fsdp2"))
    cases, sharded = (distributed_cases.cases(mode, few) for mode in ("ddp", "fsdp2"))
    assert [ddp[case]["skipped"] for case in cases if "memo" in case] == ([3, 2] if few else [3, 2, 2])
    assert {fsdp2[case]["skipped"] for case in sharded} == {0}, "sharded weights have no memo"
    assert not [file for file in (folder / "ddp").rglob("*rank1*") if "rng" not in file.name], (
        "the first process writes"
    )
    assert done.stdout.count("'eval_loss'") == len(cases) + len(sharded), "every evaluation is logged once"
    # another number of processes goes on where these stopped, and the other way round
    assert differences(weights(one), ddp["from one process"]) == []
    checkpoint = folder / "ddp pla" / "run" / "checkpoint-2"
    back = distributed_cases.resume_from(folder, "alone", distributed_cases.RESUMED[0], checkpoint)
    assert differences(weights(one), back) == []
    assert "sharded" in fsdp2["from one process"]["refused"]


def needs_deepspeed() -> None:
    """Skip without DeepSpeed, or without what it needs to build its small op."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install -e '.[deepspeed]'")
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool, path=scripts) is None]
    if missing:
        pytest.skip(f"DeepSpeed builds a small op on first use, and {missing} is not there")


def check_zero(folder: Path, one: dict[str, Any], stage: int, few: bool) -> None:
    """Equal to one process; resumed bit for bit; other numbers of processes are refused both ways."""
    mode = f"zero{stage}"
    assert compare(folder, one, mode, few) == []
    seen = json.loads((folder / f"{mode}-1.json").read_text())
    assert sum(case.startswith("resume") for case in seen) == (1 if few else 2)
    assert "was not saved under DeepSpeed" in seen["from one process"]["refused"]
    checkpoint = folder / f"{mode} pla" / "run" / "checkpoint-2"
    back = distributed_cases.resume_from(folder, "alone", distributed_cases.RESUMED[0], checkpoint)
    assert "CheckpointError" in back["refused"] and "sharded over 2 processes" in back["refused"]
    with pytest.raises(CheckpointError, match="was saved by 2 processes, but 4 are running"):
        check_processes(checkpoint, 4, deepspeed=True)
    check_processes(checkpoint, 2, deepspeed=True)


@pytest.mark.parametrize(
    ("stage", "few"), [(3, True), *(pytest.param(stage, False, marks=pytest.mark.slow) for stage in (1, 2, 3))]
)
def test_zero_equals_one_process(alone: tuple[Path, dict[str, Any]], stage: int, few: bool) -> None:
    needs_deepspeed()
    folder, one = alone
    mode = f"zero{stage}:few" if few else f"zero{stage}"
    done = launch(f"cpu_zero{stage}", distributed_cases.__file__, str(folder), mode, limit=900)
    assert done.returncode == 0, done.stderr[-3000:]
    check_zero(folder, one, stage, few)


def test_a_planted_difference_is_seen(alone: tuple[Path, dict[str, Any]]) -> None:
    _, one = alone
    for case in distributed_cases.CASES:
        seen = one[case]
        assert differences(seen, seen) == []
        weight = next(key for key in seen if key.startswith("weight"))
        moved = (torch.tensor(seen[weight]) + 3e-5).tolist()
        loss = seen["eval eval_loss"] * 1.0001
        assert len(differences(seen, {**seen, weight: moved, "eval eval_loss": loss})) == 2, case


# -- the check at save time ---------------------------------------------------------------------------------------


def _cut(saved: dict[str, torch.Tensor], name: str) -> None:
    saved[name] = saved[name][:0].clone()


def _drop(saved: dict[str, torch.Tensor], name: str) -> None:
    del saved[name]


@pytest.mark.parametrize("spoil", [_cut, _drop])
def test_an_incomplete_adapter_is_an_error(spoil: Any, tmp_path: Path) -> None:
    model = steered(layers=[1, 2])
    model.save_pretrained(tmp_path)
    check_saved(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    saved = load_file(file)
    spoil(saved, sorted(saved)[-1])
    save_file(saved, file)
    with pytest.raises(IncompleteAdapterError, match=r"layers\.2\."):
        check_saved(model, tmp_path)
    file.unlink()
    with pytest.raises(IncompleteAdapterError, match="not written"):
        check_saved(model, tmp_path)


def test_every_form_and_lora_pass_the_check(tmp_path: Path) -> None:
    from peft import get_peft_model

    for number, switches in enumerate([dict(form="gated"), dict(form="low_rank", layers="all", tied=True)]):
        steered(**switches).save_pretrained(tmp_path / str(number))
        check_saved(steered(**switches), tmp_path / str(number))
    lora = get_peft_model(tiny(), distributed_cases.LoraConfig(**distributed_cases.UPPER_LORA))
    lora.save_pretrained(tmp_path / "lora")
    check_saved(lora, tmp_path / "lora")


def test_the_trainer_checks_what_it_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_data.trainer("plain", tmp_path, loss="bipo")
    monkeypatch.setattr(Trainer, "save_model", lambda *_: None)
    with pytest.raises(IncompleteAdapterError):
        made.save_model(str(tmp_path / "adapter"))
