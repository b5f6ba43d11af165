"""Workers that are tasks of Ray, on this machine or on the cluster that `RAY_ADDRESS` names."""

from __future__ import annotations

import importlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from steertune.recipes.lab.files import ArmError

from . import Workers


class RayWorkers(Workers):
    """Tasks of Ray, each with its own CPUs and, where there are GPUs, one GPU. All machines must see the folder.

    Raises:
        ArmError: Ray is not installed.
    """

    def __init__(self, command: Sequence[str], count: int, threads: int, logs: Path) -> None:
        try:
            ray: Any = importlib.import_module("ray")  # optional, and this file has the same name
        except ImportError as error:
            raise ArmError("--engine ray: Ray is not installed. pip install ray, or use --engine local.") from error
        self.ray = ray
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        logs.mkdir(parents=True, exist_ok=True)
        # a task that dies is not repeated: other workers take its cell
        run = ray.remote(num_cpus=threads, num_gpus=int(torch.cuda.is_available()), max_retries=0)(_run)
        arguments = (list(command), os.getcwd(), threads)
        self.tasks = [run.remote(*arguments, str((logs / f"{i}.log").absolute())) for i in range(count)]

    def running(self) -> int:
        """The number of workers that have not ended; tasks that wait for a free CPU count."""
        _, running = self.ray.wait(self.tasks, num_returns=len(self.tasks), timeout=0)
        return len(running)

    def stop(self) -> None:
        """Stop the workers that are still running."""
        for task in self.tasks:
            self.ray.cancel(task, force=True)


def _run(command: list[str], folder: str, threads: int, log: str) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(log, "ab") as file:
        return subprocess.run(command, cwd=folder, stdout=file, stderr=file, env=environment, check=False).returncode


ENGINE = RayWorkers
