"""Check that a checkpoint is complete: after an adapter was saved, and before training resumes."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers.trainer import SCALER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..adapters import SteeringVectorConfig
from ..adapters.saved import check_adapter_folder, check_checksums
from .checkpoint_files import SHARDS, code_in, damaged_files, missing_states, saved_by_deepspeed
from .parallel import full_shape
from .types import SteeringRun

_STATE = "trainer_state.json"  # the last file of a checkpoint that the Trainer writes
# Parameters that PEFT saves whole and under their own name; it renames or cuts those of other adapters.
_SAVED_WHOLE = ("steering_vector_", "lora_A", "lora_B")
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")
logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """Raised for a checkpoint that is incomplete, or from another training run; the message names the file."""


class IncompleteAdapterError(RuntimeError):
    """Raised when a saved adapter does not hold what was trained."""


def adapter_folder(model: nn.Module, folder: Path) -> Path:
    """Where PEFT saves the active adapter: in a subfolder, unless its name is `default`."""
    name = str(model.active_adapter) if isinstance(model, PeftModel) else "default"
    return folder if name == "default" else folder / name


# -- after saving ---------------------------------------------------------------------------------------------------


def check_saved(model: nn.Module, folder: Path) -> None:
    """Compare the names and shapes in an adapter's file with the whole trained parameters.

    Sharded set-ups can write an empty or partial adapter without an error.

    Raises:
        IncompleteAdapterError: the file is missing, or weights are missing from it or cut off.
    """
    expected = _full_shapes(model)
    if not expected:
        return
    file = adapter_folder(model, folder) / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        if (folder / "pytorch_model_fsdp_0").is_dir():
            raise IncompleteAdapterError(
                f"{folder} holds shards but no adapter. Set fsdp_state_dict_type: FULL_STATE_DICT."
            )
        raise IncompleteAdapterError(f"{file} was not written: the adapter is not saved.")
    with safe_open(file, "pt") as saved:
        names = set(saved.keys())
        shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in names & expected.keys()}
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            raise IncompleteAdapterError(
                f"{file}: {name} has shape {shapes.get(name, 'none: it is missing')}, but {shape} were trained. Under "
                "ZeRO-3 set zero3_save_16bit_model: true, under FSDP fsdp_state_dict_type: FULL_STATE_DICT, and call "
                "save_model on every process."
            )


def _full_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name in the file -> full shape, of the active adapter's trained vectors and LoRA factors."""
    if not isinstance(model, PeftModel):
        return {}
    active, shapes = str(model.active_adapter), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and f".{active}." in f"{name}." and any(part in name for part in _SAVED_WHOLE):
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            shapes[name.replace(f".{active}", "", 1)] = full_shape(parameter)
    return shapes


# -- before resuming ------------------------------------------------------------------------------------------------


def last_checkpoint(folder: str | Path) -> str | None:
    """Find the newest complete checkpoint of a training run; None if no checkpoint is complete.

    A process that is killed while it writes leaves half a checkpoint, which `transformers.get_last_checkpoint` would
    choose. Here it is skipped with a warning.
    """
    checkpoints = {
        int(match[1]): path
        for path in (Path(folder).iterdir() if Path(folder).is_dir() else ())
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    }
    for step in sorted(checkpoints, reverse=True):
        try:
            check_checkpoint(checkpoints[step])
        except CheckpointError as error:
            logger.warning("%s Looking for an earlier checkpoint.", error)
            continue
        return str(checkpoints[step])
    if checkpoints:
        logger.warning("No checkpoint in %s is complete: training starts from the beginning.", folder)
    return None


def check_checkpoint(folder: str | Path) -> None:
    """Refuse a checkpoint that was not written completely, is damaged or lacks a part. Nothing is unpickled.

    The Trainer's own state files (`optimizer.pt`, `scheduler.pt`, `rng_state.pth`) are zip files, whose checksums are
    compared; weights and JSON have theirs in `checksums.json`, if our trainers wrote them. The Trainer reads the
    former with `weights_only=True`: tensors and plain values, no code.

    Raises:
        CheckpointError: the message names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"No checkpoint {str(folder)!r}: give a folder checkpoint-N of output_dir.")
    # The state is written last, and records its step.
    state = folder / _STATE
    if not state.is_file():
        raise CheckpointError(f"{folder} is incomplete: it has no {_STATE}, which is written last. Delete the folder.")
    try:
        step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{state} is damaged ({error!r}). Delete the folder.") from error
    name = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
    if name and step != int(name[1]):
        raise CheckpointError(f"{state} belongs to step {step!r}, not to {folder.name}. Delete the folder.")
    # Every file is complete ...
    for file, problem in damaged_files(folder):
        raise CheckpointError(f"{file} is damaged ({problem}). Delete the folder {folder}.")
    try:
        check_checksums(folder)
    except ValueError as error:
        raise CheckpointError(f"{folder} is damaged: {error}. Delete the folder.") from error
    # ... and no file is missing.
    if (missing := missing_states(folder)) is not None:
        raise CheckpointError(
            f"{folder} has no {missing}, without which training cannot continue exactly where it stopped. Resume from "
            "another checkpoint (they are complete with save_only_model=False), or start a new run from its adapter: "
            "PeftModel.from_pretrained(base, folder, is_trainable=True)."
        )


def check_state(folder: str | Path, trainer: SteeringRun) -> None:
    """Refuse a checkpoint that lacks a state which only some runs need, or that would run code.

    Raises:
        CheckpointError: the message names the file.
    """
    scaler = Path(folder) / SCALER_NAME
    # DeepSpeed keeps the scaler among its own states
    if trainer.accelerator.scaler is not None and not saved_by_deepspeed(Path(folder)) and not scaler.is_file():
        raise CheckpointError(
            f"{folder} has no {SCALER_NAME}, which fp16 training needs to continue: it was saved without fp16, or is "
            "incomplete. Resume with the precision it was saved with, or from another checkpoint."
        )
    code = None if trainer.trust_checkpoint else code_in(Path(folder))
    if code is not None:
        raise CheckpointError(
            f"{code[0]} would run code when it is read: it holds {code[1]}. If this checkpoint is your own, or you "
            "trust its author, set trainer.trust_checkpoint = True before train()."
        )


def check_adapter_in(folder: str | Path, model: Any) -> None:
    """Refuse a checkpoint without the trained adapter, or with another vector: PEFT would skip what it does not find.

    Raises:
        CheckpointError: the message names the file or the key.
    """
    if not isinstance(model, PeftModel):
        return
    name = str(model.active_adapter)
    config = model.peft_config[name]
    home = adapter_folder(model, Path(folder))
    if not any((home / file).is_file() for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise CheckpointError(
            f"{folder} has no adapter {name!r}: {home / SAFETENSORS_WEIGHTS_NAME} is missing. Give the adapter the "
            "name it had (adapter_name=), or resume from another checkpoint."
        )
    if not isinstance(config, SteeringVectorConfig):
        return
    try:
        check_adapter_folder(str(home), config)
    except ValueError as error:
        raise CheckpointError(f"{folder} does not belong to this training run: {error}") from error


def check_processes(folder: str | Path, processes: int, deepspeed: bool) -> None:
    """Refuse a checkpoint whose optimiser states are sharded over other processes; all others work with any number.

    Args:
        folder: The checkpoint.
        processes: Number of processes that run now.
        deepspeed: Whether they run under DeepSpeed, whose checkpoints hold one shard per process.

    Raises:
        CheckpointError: the message says how many processes saved it.
    """
    shards = len(list(Path(folder).glob(SHARDS)))
    if shards and not deepspeed:
        raise CheckpointError(
            f"{folder} was saved under DeepSpeed, with optimiser states sharded over {shards} processes. Continue "
            f"under DeepSpeed with {shards}, or start from its adapter: "
            "PeftModel.from_pretrained(..., is_trainable=True)."
        )
    if deepspeed and not shards:
        raise CheckpointError(
            f"{folder} was not saved under DeepSpeed, which cannot continue from it. Continue without it."
        )
    if deepspeed and shards != processes:
        raise CheckpointError(
            f"{folder} was saved by {shards} processes, but {processes} are running. DeepSpeed needs {shards}."
        )
