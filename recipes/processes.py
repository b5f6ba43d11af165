"""How many processes run, and whether they are what `accelerate launch` was asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import yaml
from accelerate.commands.config.config_args import default_yaml_config_file
from accelerate.commands.launch import launch_command_parser

_ON = ("1", "true", "yes")


class ProcessesError(RuntimeError):
    """Other processes run than were asked for."""


def announce(only_one: bool = False, environment: Mapping[str, str] = os.environ) -> str:
    """Say how many processes run, on the first one; every recipe's first line.

    A single process that should have been two trains without an error, at another batch size: `accelerate launch
    --num_processes 2 --cpu` does that.

    Args:
        only_one: Whether the recipe has no use for more than one.
        environment: What a launcher told this process.

    Raises:
        ProcessesError: fewer processes run than the launcher's configuration asks for, more than the recipe can use,
            or FSDP was asked for where accelerate leaves it out.
    """
    running = int(environment.get("WORLD_SIZE", "1"))
    command = _launcher()
    asked = None if command is None else asked_for(command)
    if asked is not None and running < asked:
        raise ProcessesError(
            f"{running} process(es) run where accelerate launch was asked for {asked}: it silently runs one for "
            "--cpu, MULTI_CPU and distributed_type NO. Use --config_file recipes/accelerate_configs/cpu_ddp.yaml, or "
            "multi_gpu.yaml on GPUs."
        )
    if only_one and running > 1:
        raise ProcessesError(
            f"{running} processes run, and this recipe uses one: each would do the same work. Start it with python."
        )
    wants_fsdp = environment.get("ACCELERATE_USE_FSDP", "").lower() in _ON
    if wants_fsdp and not _accelerator():
        raise ProcessesError(
            "FSDP was asked for, and there is no GPU: accelerate would run plain DDP without a word. Use cpu_ddp.yaml "
            "or cpu_zero3.yaml of recipes/accelerate_configs/."
        )
    kind = "FSDP" if wants_fsdp else "DDP" if running > 1 else "alone"
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() in _ON:
        kind = f"DeepSpeed ZeRO-{environment.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '?')}"
    line = f"Processes: {running} ({kind})."
    if int(environment.get("RANK", "0")) == 0:
        print(line, file=sys.stderr)
    return line


def asked_for(command: Sequence[str]) -> int | None:
    """Number of processes that the arguments of `accelerate launch` ask for, by themselves or their configuration."""
    options, _ = launch_command_parser().parse_known_args(list(command))
    if options.num_processes is not None:
        return int(options.num_processes)
    file = Path(options.config_file or default_yaml_config_file)
    if not file.is_file():
        return None
    found = yaml.safe_load(file.read_text(encoding="utf-8")) or {}  # YAML contains JSON
    asked = found.get("num_processes") if isinstance(found, dict) else None
    return asked if isinstance(asked, int) and asked > 0 else None


def _launcher() -> list[str] | None:
    """Arguments of the `accelerate launch` that started this process, if one did."""
    try:
        for parent in psutil.Process().parents()[:3]:
            words = parent.cmdline()
            for at, word in enumerate(words[:3]):
                if Path(word).name == "accelerate" and words[at + 1 : at + 2] == ["launch"]:
                    return words[at + 2 :]
                if Path(word).name in ("accelerate-launch", "accelerate.commands.launch"):
                    return words[at + 1 :]
    except psutil.Error:  # a parent that ended, or that belongs to somebody else
        return None
    return None


def _accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
