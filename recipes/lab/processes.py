"""How every recipe starts and ends: how many processes there are, whether that is as many as were asked for, their
threads, and what is said of wrong input.

`accelerate launch --num_processes 2 --cpu` runs one process and says nothing (huggingface/accelerate#2741), so what
was asked for is read from the command line of the launcher.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec

import psutil
import torch
from accelerate import PartialState
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.paths import CONFIGS
from steertune.trainers import NonFiniteError

P = ParamSpec("P")
LAUNCHES = CONFIGS / "accelerate"
"""Configurations of `accelerate launch`."""


def command(main: Callable[P, int]) -> Callable[P, int]:
    """A recipe's `main` that says in one line what is wrong with its input, and returns 2.

    With `python -X dev` it ends in the traceback, as errors that no input should cause always do.
    """

    @functools.wraps(main)
    def said(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except (ValueError, OSError, NonFiniteError) as error:
            if sys.flags.dev_mode:
                raise
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 2

    return said


def positive(text: str) -> int:
    """A number on the command line that counts something: whole, and 1 or more."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def begin(threads: int | None = None, running: int | None = None, only_one: bool = False) -> None:
    """Say how many processes run, and set the threads of a CPU run.

    Args:
        threads: None: all cores for a single process, which `accelerate launch` leaves with one thread.
        running: How many processes there are, where they work side by side and form no group.
        only_one: Whether several would all do the same.

    Raises:
        ArmError: fewer processes run than the launcher was asked for, more than the recipe has work for, or FSDP
            without a GPU, which accelerate leaves out without a word.
    """
    # accelerate must hear that this is a CPU run, or every process of several believes to be alone
    state = PartialState(cpu=not torch.cuda.is_available())
    running = running or state.num_processes
    command = launcher()
    asked = None if command is None else asked_for(command)
    if asked is not None and asked > running:
        raise ArmError(
            f"{asked} processes were asked for, {running} run ({state.distributed_type.value}). On a CPU: "
            "accelerate launch --config_file $(steertune config cpu_ddp) ..., not --cpu nor MULTI_CPU."
        )
    if only_one and running > 1:
        raise ArmError(f"{running} processes run, and this recipe has work for one. Start it with python.")
    device = str(state.device)
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes") and device == "cpu":
        raise ArmError("FSDP was asked for, and there is no GPU: accelerate would run DDP. Use cpu_ddp or cpu_zero3.")
    if state.num_processes > 1 and state.is_main_process:
        kind = f"{state.distributed_type.value}, {device.partition(':')[0]}"
        print(f"{state.num_processes} processes ({kind})", file=sys.stderr)
    if threads is None and state.num_processes == 1:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if threads is not None:
        torch.set_num_threads(threads)


def default_device() -> str:
    """Where a recipe runs a model that no trainer places."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def launcher() -> list[str] | None:
    """The words behind `accelerate launch` that this process comes from; None if it was started otherwise."""
    for parent in psutil.Process().parents():
        try:
            words = parent.cmdline()
        except psutil.Error:  # gone, or another user's
            continue
        for i, word in enumerate(words[:3]):
            name = Path(word).name
            if (
                name == "accelerate-launch"
                or word == "accelerate.commands.launch"
                or word.endswith("commands/launch.py")
            ):
                return words[i + 1 :]
            if name == "accelerate" and words[i + 1 : i + 2] == ["launch"]:
                return words[i + 2 :]
    return None


def asked_for(words: Sequence[str]) -> int | None:
    """How many processes these words ask `accelerate launch` for; None if they do not say."""
    options, _ = launch_command_parser().parse_known_args(words)
    if options.num_processes:
        return options.num_processes
    file = options.config_file or (default_config_file if os.path.isfile(default_config_file) else None)
    return None if file is None else getattr(load_config_from_file(file), "num_processes", None)
