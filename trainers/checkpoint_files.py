"""Find files that a checkpoint lacks to resume exactly, files that are damaged, and files that would run code.

The Trainer skips a missing file silently: without `optimizer.pt` it continues with an optimiser that has forgotten
the steps before, and the result differs.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

SHARDS = "global_step*/*zero_pp_rank_*_optim_states.pt"  # DeepSpeed's, one per process
# Classes in the states of DeepSpeed's optimisers, apart from tensors and plain values. They are small, and run no code
# that a file could choose.
_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def saved_by_deepspeed(folder: Path) -> bool:
    """Whether a checkpoint was saved under DeepSpeed."""
    return any(folder.glob("global_step*/"))


def missing_states(folder: Path) -> str | None:
    """The first file of the training's state that a checkpoint lacks; None if it has all.

    Only the trainer knows whether the run needs more (a scaler in fp16).
    """
    if saved_by_deepspeed(folder):
        if not (folder / "latest").is_file():
            return "latest"
        if not any(folder.glob("global_step*/*model_states.pt")):
            return "global_step*/*model_states.pt"
        if not any(folder.glob(SHARDS)):
            return SHARDS
    else:
        # the latter two are FSDP's
        if not any(any(folder.glob(name)) for name in ("optimizer.pt", "optimizer.bin", "optimizer_*/")):
            return "optimizer.pt"
        if not (folder / "scheduler.pt").is_file():
            return "scheduler.pt"
    return _missing_random_state(folder)


def _missing_random_state(folder: Path) -> str | None:
    """The missing file of random numbers: one process writes one file, several write one each."""
    if (folder / "rng_state.pth").is_file():
        return None
    ranks = {int(file.stem.rpartition("_")[2]) for file in folder.glob("rng_state_[0-9]*.pth")}
    if not ranks:
        return "rng_state.pth"
    gap = min(set(range(max(len(ranks), 2))) - ranks, default=None)
    return None if gap is None else f"rng_state_{gap}.pth"


def damaged_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """The weights and state files of a checkpoint that cannot be read completely, each with the reason."""
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            yield file, str(error)
    # PyTorch's files are zip archives
    archives = [file for file in folder.rglob("*") if file.suffix in (".pt", ".pth", ".bin") and file.is_file()]
    for file in sorted(archives):
        try:
            with zipfile.ZipFile(file) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
            yield file, str(error)
            continue
        if broken is not None:
            yield file, f"checksum of {broken}"


def code_in(folder: Path) -> tuple[Path, str] | None:
    """The first file of a checkpoint that would run code when training resumes, and that code; None if none does.

    The Trainer reads its own state with `weights_only=True`. DeepSpeed unpickles its `*_states.pt` without it, and
    FSDP the `.metadata` of shards. Nothing is unpickled here: PyTorch lists the names in a file's pickle.
    """
    for file in sorted(folder.rglob(".metadata")):
        return file, "a pickle of FSDP's shards, which cannot be inspected"
    if not saved_by_deepspeed(folder):
        return None
    latest = (folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"global_step\d+", latest) or not (folder / latest).is_dir():
        return folder / "latest", f"the name of another folder, {latest!r:.80}"
    for file in sorted((folder / latest).rglob("*.pt")):
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
            return file, f"a pickle that PyTorch cannot inspect: {error}"
        if unknown := sorted({*names} - _DEEPSPEED):
            return file, unknown[0]
    return None
