"""Resuming: the newest checkpoint that is whole, and an adapter that was trained beside its frozen reference copy."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer import SCALER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..adapters import SteeringVectorConfig
from ..adapters.saved import check_adapter_folder, check_checksums, write_checksums
from ._at import REFERENCE_ADAPTER
from ._saved import adapter_folder
from .checkpoint_files import SHARES, code_in, damaged_archives, missing_states, sharded

if TYPE_CHECKING:
    from ._mixin import SteeringMixin

_STATE = "trainer_state.json"  # the last file of a checkpoint that the Trainer writes
logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint is not whole, or not of this training; the message names the file."""


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint of a training that is whole; None if there is none.

    A process that is killed while it writes leaves half a checkpoint, which `transformers.get_last_checkpoint` would
    choose. It is passed over here, with a warning.
    """
    found = {
        int(match[1]): path
        for path in (Path(folder).iterdir() if Path(folder).is_dir() else ())
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    }
    for step in sorted(found, reverse=True):
        try:
            check_checkpoint(found[step])
        except CheckpointError as error:
            logger.warning("%s An earlier checkpoint is looked for.", error)
            continue
        return str(found[step])
    if found:
        logger.warning("No checkpoint in %s is whole: training starts from the beginning.", folder)
    return None


def check_checkpoint(folder: str | Path) -> None:
    """Refuse a checkpoint that was not written to its end, is damaged or lacks a part. Nothing is unpickled.

    The Trainer's own state files (`optimizer.pt`, `scheduler.pt`, `rng_state.pth`) are zip files, whose checksums are
    compared; weights and JSON have theirs in `checksums.json`, if our trainers wrote them. The Trainer reads the
    former with `weights_only=True`: tensors and plain values, no code.

    Raises:
        CheckpointError: names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"No checkpoint {str(folder)!r}: give a folder checkpoint-N of output_dir.")
    state = folder / _STATE
    if not state.is_file():
        raise CheckpointError(f"{folder} is not whole: it has no {_STATE}, which is written last. Delete the folder.")
    try:
        step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{state} is damaged ({error!r}). Delete the folder.") from error
    named = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
    if named and step != int(named[1]):
        raise CheckpointError(f"{state} is of step {step!r}, not of {folder.name}. Delete the folder.")
    for file, problem in _damaged(folder):
        raise CheckpointError(f"{file} is damaged ({problem}). Delete the folder {folder}.")
    try:
        check_checksums(folder)
    except ValueError as error:
        raise CheckpointError(f"{folder} is damaged: {error}. Delete the folder.") from error
    if (missing := missing_states(folder)) is not None:
        raise CheckpointError(
            f"{folder} has no {missing}, without which training would not go on where it stopped, but end elsewhere. "
            "Resume from another checkpoint (they are whole with save_only_model=False), or start a new training from "
            "its adapter: PeftModel.from_pretrained(base, folder, is_trainable=True)."
        )


def check_state(folder: str | Path, trainer: SteeringMixin) -> None:
    """Refuse a checkpoint that lacks what this run needs beyond the others, or that would run code of its own.

    Raises:
        CheckpointError: names the file.
    """
    scaler = Path(folder) / SCALER_NAME
    # DeepSpeed keeps the scaler among its own states
    if trainer.accelerator.scaler is not None and not sharded(Path(folder)) and not scaler.is_file():
        raise CheckpointError(
            f"{folder} has no {SCALER_NAME}, which a training in fp16 goes on with: it was saved without fp16, or is "
            "not whole. Resume with the precision it was saved with, or from another checkpoint."
        )
    code = None if trainer.trust_checkpoint else code_in(Path(folder))
    if code is not None:
        raise CheckpointError(
            f"{code[0]} would run code when it is read: it holds {code[1]}. If this checkpoint is your own, or you "
            "trust who made it, set trainer.trust_checkpoint = True before train()."
        )


def check_adapter_in(folder: str | Path, model: Any) -> None:
    """Refuse a checkpoint without the adapter that is trained, or whose steering vector is not the one being trained:
    PEFT would leave out what it misses.

    Raises:
        CheckpointError: names the file or the key.
    """
    if not isinstance(model, PeftModel):
        return
    config = model.peft_config[str(model.active_adapter)]
    home = adapter_folder(model, Path(folder))
    if not any((home / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise CheckpointError(
            f"{folder} has no adapter {str(model.active_adapter)!r}: {home / SAFETENSORS_WEIGHTS_NAME} is missing. "
            "Give the adapter the name it had (adapter_name=), or resume from another checkpoint."
        )
    if not isinstance(config, SteeringVectorConfig):
        return
    try:
        check_adapter_folder(str(home), config)
    except ValueError as error:
        raise CheckpointError(f"{folder} is not of this training: {error}") from error


def check_processes(folder: str | Path, processes: int, deepspeed: bool) -> None:
    """Refuse a checkpoint whose optimiser states lie in shares of other processes; all others work with any number.

    Args:
        folder: The checkpoint.
        processes: How many run now.
        deepspeed: Whether they run under DeepSpeed, whose checkpoints hold a share of every process.

    Raises:
        CheckpointError: says how many processes it is of.
    """
    shares = len(list(Path(folder).glob(SHARES)))
    if shares and not deepspeed:
        raise CheckpointError(
            f"{folder} was saved under DeepSpeed, its optimiser states in shares of {shares} processes: go on under "
            f"DeepSpeed with {shares}, or start from its adapter (PeftModel.from_pretrained(..., is_trainable=True))."
        )
    if deepspeed and not shares:
        raise CheckpointError(f"{folder} was not saved under DeepSpeed, which cannot go on from it. Go on without it.")
    if deepspeed and shares != processes:
        raise CheckpointError(f"{folder} is of {shares} processes, {processes} run now: DeepSpeed needs {shares}.")


def _damaged(folder: Path) -> Iterator[tuple[Path, str]]:
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            yield file, str(error)
    yield from damaged_archives(folder)


class Checksums(TrainerCallback):
    """Leaves the checksums of weights and JSON in every checkpoint, as soon as it is whole."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer event: a checkpoint was written."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_checksums(folder)


class RestoredAdapter(TrainerCallback):
    """Loads the trained adapter of a checkpoint that holds several.

    The trained one lies in the checkpoint itself, the reference in a folder of it. transformers 5.17 loads only what
    lies in folders, so training would start again from the beginning without a word; later versions load both.
    """

    def __init__(self, trainer: SteeringMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer event: everything is loaded, no step is taken."""
        model, folder = self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.resumed
        if folder is None or not isinstance(model, PeftModel) or REFERENCE_ADAPTER not in model.peft_config:
            return
        home = adapter_folder(model, Path(folder))
        if (home / SAFETENSORS_WEIGHTS_NAME).is_file():
            model.load_adapter(str(home), str(model.active_adapter), is_trainable=True)
