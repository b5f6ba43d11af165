"""Whole means whole: a checkpoint without a part of the training's state is refused, and none runs code."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_files import Trap
from peft import LoraConfig
from tiny_data import pairs, same, trainer, values

from steertune.trainers import CheckpointError, last_checkpoint
from steertune.trainers.checkpoint_files import code_in, missing_states


def new(folder: Path, kind: str = "dpo", loss: str | None = "dpo", **options: Any) -> Any:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, **options}
    return trainer(kind, folder, data=pairs(16) if kind != "sft" else None, loss=loss, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with checkpoints of two steps."""
    folder = tmp_path_factory.mktemp("run")
    new(folder).train()
    return folder


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("listed", [True, False], ids=["with checksums", "without"])
def test_a_missing_state_is_named(name, listed, run, tmp_path, caplog):
    shutil.copytree(run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    (checkpoint / name).unlink()
    if not listed:
        (checkpoint / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}, without which training cannot continue.*is_trainable"):
        new(tmp_path / "run", max_steps=3).train(resume_from_checkpoint=str(checkpoint))
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-1")
    assert f"has no {name}" in caplog.text


@pytest.mark.parametrize("kind", ["plain", "sft", "dpo"])
@pytest.mark.parametrize("ours", [True, False], ids=["our loss", "the parent's"])
def test_checkpoints_of_the_model_only_are_refused(kind, ours, tmp_path):
    loss = None if not ours else "cross_entropy" if kind == "sft" else "dpo"
    if kind == "plain" and not ours:
        pytest.skip("Trainer has no loss for pairs")
    new(tmp_path, kind, loss, save_only_model=True).train()
    made = new(tmp_path, kind, loss, save_only_model=True, max_steps=3)
    with pytest.raises(CheckpointError, match="has no optimizer.pt.*save_only_model=False"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        made.train(resume_from_checkpoint=True)


def test_fp16_needs_its_scaler(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    made = new(tmp_path / "run", max_steps=3)
    made.accelerator.scaler = torch.amp.GradScaler("cpu")  # what fp16 brings
    with pytest.raises(CheckpointError, match=r"has no scaler.pt, which fp16 training needs to continue"):
        made.train(resume_from_checkpoint=True)


def test_random_numbers_of_several_processes_have_no_gap(run, tmp_path):
    folder = shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    assert missing_states(folder) == "rng_state_1.pth"
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    assert missing_states(folder) is None
    (folder / "rng_state_0.pth").unlink()
    assert missing_states(folder) == "rng_state_0.pth"


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["vector", "lora"])
def test_a_checkpoint_without_its_adapter_is_refused(adapter, tmp_path):
    options = {} if adapter is None else {"peft_config": adapter}
    new(tmp_path, **options).train()
    (tmp_path / "checkpoint-2" / "adapter_model.safetensors").unlink()
    (tmp_path / "checkpoint-2" / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is missing"):
        new(tmp_path, max_steps=3, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# -- DeepSpeed's ------------------------------------------------------------------------------------------------------


def under_deepspeed(run: Path, folder: Path, state: Any = None) -> Path:
    """A checkpoint as DeepSpeed leaves it: its states in a folder of their own, which it unpickles."""
    made = shutil.copytree(run / "checkpoint-2", folder / "checkpoint-2")
    (made / "optimizer.pt").unlink()
    states = made / "global_step2"
    states.mkdir()
    (made / "latest").write_text("global_step2")
    torch.save({"module": {}}, states / "mp_rank_00_model_states.pt")
    torch.save({"optimizer": state}, states / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return made


def test_plain_states_of_deepspeed_are_read(run, tmp_path):
    folder = under_deepspeed(run, tmp_path, {"step": torch.ones(2)})
    assert missing_states(folder) is None and code_in(folder) is None


def test_the_classes_that_deepspeed_saves_are_known(run, tmp_path):
    """What a checkpoint of ZeRO-1 to 3 names; `test_distributed.py` resumes real ones."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    state = [
        LossScaler(1.0),
        DynamicLossScaler(1.0, 2.0, 1, 1.0, 1),
        ZeroStageEnum.weights,
        fragment_address(2, 0),
    ]
    assert code_in(under_deepspeed(run, tmp_path, state)) is None


@pytest.mark.parametrize("protocol", [2, 4])
def test_states_that_name_code_are_refused_without_the_flag(protocol, run, tmp_path):
    folder = under_deepspeed(run, tmp_path)
    shares = folder / "global_step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer": Trap(tmp_path / "sprung")}, shares, pickle_protocol=protocol)
    made = new(tmp_path, max_steps=3)
    made.is_deepspeed_enabled = True
    with pytest.raises(
        CheckpointError, match=r"optim_states.pt would run code when it is read.*trust_checkpoint = True"
    ):
        made.checkpoints.resume_from(str(folder))
    made.trust_checkpoint = True
    assert made.checkpoints.resume_from(str(folder)) == str(folder)
    assert not (tmp_path / "sprung").exists()


def test_damaged_and_missing_states_of_deepspeed_are_named(run, tmp_path):
    folder = under_deepspeed(run, tmp_path, {"step": torch.ones(99)})
    shares = folder / "global_step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    whole = shares.read_bytes()
    shares.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"optim_states.pt is damaged"):
        new(tmp_path).checkpoints.resume_from(str(folder))
    shares.write_bytes(whole)
    (folder / "latest").write_text("../elsewhere")
    assert code_in(folder) == (folder / "latest", "the name of another folder, '../elsewhere'")
    (folder / "latest").unlink()
    assert missing_states(folder) == "latest"
    (folder / "latest").write_text("global_step2")
    (folder / "global_step2" / "mp_rank_00_model_states.pt").unlink()
    assert missing_states(folder) == "global_step*/*model_states.pt"


def test_pickled_metadata_of_shards_needs_the_flag(run, tmp_path):
    folder = shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    os.makedirs(folder / "optimizer_0")
    (folder / "optimizer_0" / ".metadata").write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError, match=r"\.metadata would run code"):
        new(tmp_path).checkpoints.resume_from(str(folder))


def test_a_whole_checkpoint_still_goes_on_to_the_same_result(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    straight = new(tmp_path / "straight", max_steps=3, lr_scheduler_type="constant")
    straight.train()
    half = new(tmp_path / "half", max_steps=3, lr_scheduler_type="constant")
    half.train()
    again = new(tmp_path / "half", max_steps=3, lr_scheduler_type="constant")
    again.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-1"))
    assert same(values(again.model), values(straight.model))
