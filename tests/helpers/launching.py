"""Scripts on several processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from paths import HELPERS

from steertune.recipes.lab.processes import LAUNCHES


def launch(config: str, *command: str, limit: int = 900) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` with a configuration of ours; ends with everything it started."""
    here = str(HELPERS)
    inherited = os.environ.get("PYTHONPATH", "")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "PYTEST_", "COV_"))}
    environment |= {"PYTHONPATH": os.pathsep.join([here, *filter(None, [inherited])]), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    words = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(LAUNCHES / f"{config}.yaml"),
        *command,
    ]
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, error = process.communicate(timeout=limit)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(words, process.returncode, out, error)
