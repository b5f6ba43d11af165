"""Peak memory of a process."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


def reset_peak_memory() -> None:
    """Restart the count of peak memory, where the system supports it (CUDA, Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _PROCESS.is_dir():
        with suppress(OSError):
            (_PROCESS / "clear_refs").write_text("5")


def peak_memory_gb() -> float:
    """Peak memory in GB since `reset_peak_memory`: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if _PROCESS.is_dir():
        status = (_PROCESS / "status").read_text()
        return float(status.split("VmHWM:")[1].split()[0]) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak / 1e6
