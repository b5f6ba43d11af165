"""Which files a checkpoint needs so that training goes on from it as if it had never stopped; and which name code.

The Trainer leaves out silently what is not there: without `optimizer.pt` it goes on with an optimiser that knows
nothing of the steps before, and ends elsewhere.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

SHARES = "global_step*/*zero_pp_rank_*_optim_states.pt"  # DeepSpeed's, one a process
# What the states of DeepSpeed's optimisers hold besides tensors and plain values: small classes, which run no code
# that their files could choose.
_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def missing_states(folder: Path) -> str | None:
    """The first file of the training's state that a checkpoint lacks; None: it has all.

    Whether the run needs more (fp16 has a scaler) only its trainer knows.
    """
    if sharded(folder):
        if not (folder / "latest").is_file():
            return "latest"
        if not any(folder.glob("global_step*/*model_states.pt")):
            return "global_step*/*model_states.pt"
        if not any(folder.glob(SHARES)):
            return SHARES
    else:
        # the latter two are FSDP's
        if not any(any(folder.glob(name)) for name in ("optimizer.pt", "optimizer.bin", "optimizer_*/")):
            return "optimizer.pt"
        if not (folder / "scheduler.pt").is_file():
            return "scheduler.pt"
    return _missing_random_state(folder)


def _missing_random_state(folder: Path) -> str | None:
    """The file of random numbers that is not there: one process writes one, several write one each."""
    if (folder / "rng_state.pth").is_file():
        return None
    ranks = {int(file.stem.rpartition("_")[2]) for file in folder.glob("rng_state_[0-9]*.pth")}
    if not ranks:
        return "rng_state.pth"
    gap = min(set(range(max(len(ranks), 2))) - ranks, default=None)
    return None if gap is None else f"rng_state_{gap}.pth"


def sharded(folder: Path) -> bool:
    """Whether a checkpoint was saved under DeepSpeed."""
    return any(folder.glob("global_step*/"))


def damaged_archives(folder: Path) -> Iterator[tuple[Path, str]]:
    """The files of PyTorch in a checkpoint that are no whole zip files, each with the reason."""
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
    """The first file of a checkpoint that is unpickled on resume and names code, and that code; None: there is none.

    The Trainer reads its own state with `weights_only=True`. DeepSpeed unpickles its `*_states.pt` without, and FSDP
    the `.metadata` of shards. Nothing is unpickled here: PyTorch lists the names that a file's pickle holds.
    """
    for file in sorted(folder.rglob(".metadata")):
        return file, "a pickle of FSDP's shards, which cannot be looked into"
    if not sharded(folder):
        return None
    latest = (folder / "latest").read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"global_step\d+", latest) or not (folder / latest).is_dir():
        return folder / "latest", f"the name of another folder, {latest!r:.80}"
    for file in sorted((folder / latest).rglob("*.pt")):
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
            return file, f"what PyTorch cannot look into: {error}"
        if unknown := sorted({*names} - _DEEPSPEED):
            return file, unknown[0]
    return None
