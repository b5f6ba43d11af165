"""The start of every recipe: check the number of processes against the requested number, and set their threads.

`accelerate launch --num_processes 2 --cpu` silently runs one process (huggingface/accelerate#2741), so the requested
number is read from the command line of the launcher.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.utils.cpp_extension import get_default_build_root

from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.quiet import quiet

_MOST_THREADS = 64  # every machine can start this many


def begin(threads: int | None = None, running: int | None = None, only_one: bool = False) -> None:
    """Check that the requested number of processes runs, set the threads of a CPU run, and silence libraries.

    Args:
        threads: CPU threads of this process; None: `OMP_NUM_THREADS`, else the cores that this process may use, which
            the processes of one launch share.
        running: How many processes there are, if they work independently and form no group.
        only_one: Whether the recipe has work for only one process.

    Raises:
        ArmError: fewer processes run than were requested, or more than the recipe has work for; FSDP without a GPU,
            which accelerate silently turns into DDP; more threads than a machine can start.
    """
    quiet()
    check_threads(threads)
    # without `cpu`, each of several processes of a CPU run is taken for the only one by accelerate
    state = PartialState(cpu=not torch.cuda.is_available())
    running = running or state.num_processes
    launched = launcher()
    requested = None if launched is None else asked_for(launched[1])
    if requested is not None and requested > running:
        raise ArmError(
            f"{requested} processes were requested, but {running} run ({state.distributed_type.value}). On a CPU, use "
            "accelerate launch --config_file $(steertune config cpu_ddp) ..., not --cpu or MULTI_CPU."
        )
    if only_one and running > 1:
        raise ArmError(f"{running} processes run, but this recipe has work for one. Start it with python.")
    device = str(state.device)
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes") and device == "cpu":
        raise ArmError("FSDP needs a GPU; without one, accelerate would run DDP. Use cpu_ddp or cpu_zero3.")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and state.is_main_process:
        say_build_locks()
    if state.num_processes > 1 and state.is_main_process:
        kind = f"{state.distributed_type.value}, {device.partition(':')[0]}"
        print(f"{state.num_processes} processes ({kind})", file=sys.stderr)
    torch.set_num_threads(threads or default_threads(launched, running))


def check_threads(threads: int | None) -> None:
    """Refuse more threads than a machine can be sure to start, since the process would end without an error.

    Raises:
        ArmError: the message names the number of cores.
    """
    cores = os.cpu_count() or 1
    if threads is not None and threads > max(_MOST_THREADS, 4 * cores):
        raise ArmError(f"threads={threads}, but this machine has {cores} cores. Use one thread for each at most.")


def say_build_locks() -> None:
    """Print the lock files of PyTorch extensions such as DeepSpeed's optimiser: a build that was killed leaves its
    lock, and every later process silently waits for it."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted(root.glob("**/lock")):
        print(
            f"{lock} exists: another process builds this extension, and this one waits for it, or it was killed. If "
            "no other process runs, delete the file.",
            file=sys.stderr,
        )


def default_threads(launched: tuple[Mapping[str, str], list[str]] | None = None, running: int = 1) -> int:
    """Threads of a process: `OMP_NUM_THREADS`, else its share of the cores that this process can use. For a launch,
    the environment of the launcher and `--num_cpu_threads_per_process` count, since `accelerate launch` sets
    `OMP_NUM_THREADS=1` by itself."""
    chosen = os.environ.get("OMP_NUM_THREADS")
    if launched is not None:
        environment, words = launched
        options, _ = launch_command_parser().parse_known_args(words)
        chosen = options.num_cpu_threads_per_process or environment.get("OMP_NUM_THREADS")
    if chosen and str(chosen).isdigit():
        return int(chosen)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // running)


def device_of(name: str | None = None) -> str:
    """The device for a model that no trainer places: the one of that name, by default a GPU if there is one.

    Raises:
        ArmError: PyTorch does not know the device, or this machine does not have it.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(0, device=name).is_meta:
            raise RuntimeError("it holds no weights")
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise ArmError(f"--device {name!r} cannot be used: {why:.200}. Use cpu, or a GPU such as cuda:0.") from error
    return name


def launcher() -> tuple[Mapping[str, str], list[str]] | None:
    """The environment and the arguments of the `accelerate launch` that started this process; None if it was started
    otherwise."""
    for parent in psutil.Process().parents():
        try:
            words = parent.cmdline()
            for i, word in enumerate(words[:3]):
                name = Path(word).name
                if (
                    name == "accelerate-launch"
                    or word == "accelerate.commands.launch"
                    or word.endswith("commands/launch.py")
                ):
                    return parent.environ(), words[i + 1 :]
                if name == "accelerate" and words[i + 1 : i + 2] == ["launch"]:
                    return parent.environ(), words[i + 2 :]
        except psutil.Error:  # gone, or another user's
            continue
    return None


def asked_for(words: Sequence[str]) -> int | None:
    """The number of processes that arguments of `accelerate launch` request; None if they request none."""
    options, _ = launch_command_parser().parse_known_args(words)
    if options.num_processes:
        return options.num_processes
    file = options.config_file or (default_config_file if os.path.isfile(default_config_file) else None)
    return None if file is None else getattr(load_config_from_file(file), "num_processes", None)
