"""Workers that are processes of this machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from . import Workers


class LocalWorkers(Workers):
    """Processes of this machine; GPUs are assigned to them in turn."""

    def __init__(self, command: Sequence[str], count: int, threads: int, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.processes = []
        for i in range(count):
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            if devices := _devices():
                environment["CUDA_VISIBLE_DEVICES"] = devices[i % len(devices)]
            with (logs / f"{i}.log").open("ab") as log:
                self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))

    def running(self) -> int:
        """The number of workers that are still running."""
        return sum(process.poll() is None for process in self.processes)

    def stop(self) -> None:
        """Stop the workers that are still running, and wait until they have ended."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait()


def _devices() -> list[str]:
    """The GPUs that this process may use, by the names that a child process knows them by."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


ENGINE = LocalWorkers
