"""Whether everything works on a GPU, and what a training step costs there: one command, no network, ten minutes.

    bash recipes/studies/gpu.sh --folder runs/gpu                  # on a machine with a GPU
    bash recipes/studies/gpu.sh --tiny --folder runs/without       # the same on a CPU, with tiny sizes

The checks compare the device with the CPU: steering in 32 and 16 bits, training, the cached prefix in pinned memory,
how often the host waits in a step, arms side by side, a 4-bit base, sharded weights, cached generation, the server's
engine and, at the end, `torch.compile`. Before that, the steps of our trainers and of TRL with a LoRA are timed on a
model with the sizes of Llama 3.2 1B and random weights. Nothing is downloaded: model, tokenizer and rows are made up.

A check that fails does not stop the others, and after `--seconds` the table is written with the results so far.
Every result is written to `table.md` and `table.json` as soon as it is available.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch

from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.files import ArmError, write_result, write_whole
from steertune.recipes.lab.options import Count, Option, Threads
from steertune.recipes.lab.processes import begin
from steertune.recipes.studies.device.checks import CHECKS, LAST
from steertune.recipes.studies.device.steps import Timing, matrix_rate, time_steps
from steertune.recipes.studies.device.world import NotRun, World

_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")
_GOALS = {"SFT": 3, "pairs": 5}
"""How many times faster than TRL + LoRA."""
_SHARE, _MEMORY = 0.4, 0.5
"""Share of the measured matrix rate, and of TRL's memory."""


@command
def main(
    folder: Annotated[Path, Option(help="where the results are written")] = Path("runs/gpu"),
    seconds: Annotated[int, Count("time limit for everything")] = 540,
    tiny: Annotated[bool, Option("--tiny", help="tiny sizes; runs on a CPU where there is no GPU")] = False,
    threads: Threads = None,
) -> Result:
    """Run the checks, time the steps, and write the table; the exit code is 1 when a check failed."""
    if not tiny and not torch.cuda.is_available():
        raise ArmError("torch sees no GPU, and the model has a billion weights. Use --tiny to run on a CPU.")
    begin(threads, only_one=True)
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder, tiny)
    watchdog = threading.Timer(seconds, report.give_up, [seconds])
    watchdog.daemon = True
    watchdog.start()
    world = World.make(tiny, folder)
    for name, check in CHECKS.items():
        report.run(name, lambda check=check: check(world))
    report.run("matrix rate in 16 bits", lambda: report.rate(matrix_rate(world)))
    report.run("steps", lambda: report.steps(time_steps(world)))
    for name, check in LAST.items():
        report.run(name, lambda check=check: check(world))
    watchdog.cancel()
    report.write()
    return Result(report.values(), report.page(), 1 if report.failed else 0)


class Report:
    """The results so far.

    Args:
        folder: Where it is written.
        tiny: Whether sizes are tiny.
    """

    def __init__(self, folder: Path, tiny: bool) -> None:
        self.folder, self.tiny = folder, tiny
        self.checks: dict[str, dict[str, Any]] = {}
        self.timings: list[Timing] = []
        self.tflops: float | None = None
        self.unfinished = ""
        self._running = ""

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [name for name, check in self.checks.items() if check["outcome"] == "failed"]

    def run(self, name: str, function: Any) -> None:
        """Run one part and record how it ended; an error does not end the script."""
        self._running, started = name, time.monotonic()
        try:
            outcome, said = "passed", function() or ""
        except NotRun as reason:
            outcome, said = "not run", str(reason)
        except Exception as error:
            traceback.print_exc()
            outcome, said = "failed", f"{type(error).__name__}: {error}"
        note = {"outcome": outcome, "said": said, "seconds": round(time.monotonic() - started, 1)}
        self.checks[name] = note
        print(f"{name}: {outcome} ({note['seconds']} s) {said}", file=sys.stderr, flush=True)
        self.write()

    def rate(self, tflops: float) -> str:
        """Record the matrix rate."""
        self.tflops = tflops
        return f"{tflops:.3g} TFLOP/s"

    def steps(self, timings: Any) -> str:
        """Record timings as they come in."""
        for timing in timings:
            self.timings.append(timing)
            self.write()
        return f"{len(self.timings)} ways"

    def give_up(self, seconds: int) -> None:
        """The time is up: write the results so far, and end the process."""
        self.unfinished = f"The time limit of {seconds} s was reached during: {self._running}."
        self.write()
        print(self.unfinished, file=sys.stderr, flush=True)
        os._exit(1)

    def values(self) -> dict[str, Any]:
        """Everything, for `table.json`."""
        return {
            "machine": machine(),
            "tiny": self.tiny,
            "unfinished": self.unfinished,
            "checks": self.checks,
            "tflops": self.tflops,
            "steps": [vars(timing) for timing in self.timings],
        }

    def write(self) -> None:
        """Write both files."""
        write_result(self.folder / "table.json", self.values())
        write_whole(self.folder / "table.md", self.page())

    def page(self) -> str:
        """The table in Markdown."""
        command = f"bash recipes/studies/gpu.sh{' --tiny' if self.tiny else ''}"
        lines = ["# On a GPU", "", f"`{command}` on {machine()}.", ""]
        lines += [self.unfinished, ""] if self.unfinished else []
        lines += ["| check | outcome | seconds | |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {one['outcome']} | {one['seconds']} | {one['said'].replace('|', '/')[:300]} |"
            for name, one in self.checks.items()
        ]
        return "\n".join([*lines, "", *self._steps()]) + "\n"

    def _steps(self) -> list[str]:
        """The table of steps, each beside TRL with a LoRA on the same rows."""
        if not self.timings:
            return []
        base = {timing.kind: timing for timing in self.timings if timing.is_baseline}
        goals = ", ".join(f"{kind} {goal} times faster" for kind, goal in _GOALS.items())
        lines = [
            f"Goals: {goals}, {_SHARE:.0%} of the measured matrix rate, {_MEMORY:.0%} of the memory.",
            "",
            "| way | s per step | times faster | share of the matrix rate | peak memory, GB | of TRL's |",
            "|---|---|---|---|---|---|",
        ]
        for one in self.timings:
            other = base.get(one.kind)
            faster = "" if other is None else f"{other.seconds / one.seconds:.2f}"
            share = "" if not self.tflops else f"{one.flops / one.seconds / self.tflops / 1e12:.2f}"
            memory = "" if other is None or not other.memory_gb else f"{one.memory_gb / other.memory_gb:.2f}"
            cells = [one.name, f"{one.seconds:.4f}", faster, share, f"{one.memory_gb:.2f}", memory]
            lines.append(f"| {' | '.join(cells)} |")
        return lines


def machine() -> str:
    """The device and the versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    return f"{device}; {', '.join(f'{name} {version(name)}' for name in _PACKAGES)}"


if __name__ == "__main__":
    sys.exit(main())
