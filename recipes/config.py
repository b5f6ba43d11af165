"""Print the path of a configuration for `accelerate launch`.

    accelerate launch --config_file $(steertune config zero2) -m steertune.recipes.train

Without a name it lists them. GPUs: single_gpu, multi_gpu, fsdp1, fsdp2, zero1, zero2, zero3 (eight processes, unless
`--num_processes` is set). Two processes on a CPU, for tests: cpu_ddp, cpu_zero1, cpu_zero2, cpu_zero3.
"""

from __future__ import annotations

import sys
from typing import Annotated

from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.files import ArmError, nearest
from steertune.recipes.lab.options import Argument
from steertune.recipes.lab.paths import LAUNCHES


def configurations(incomplete: str = "") -> list[str]:
    """Names of the configurations."""
    return sorted(file.stem for file in LAUNCHES.glob(f"{incomplete}*.yaml"))


@command
def main(
    name: Annotated[str | None, Argument(help="its name, without .yaml", autocompletion=configurations)] = None,
) -> Result:
    """Find a configuration, or list them all."""
    files = {name: LAUNCHES / f"{name}.yaml" for name in configurations()}
    if name is None:
        lines = {name: file.read_text(encoding="utf-8").splitlines()[0][2:] for name, file in files.items()}
        width = max(map(len, lines))
        return Result(lines, "\n".join(f"{name:<{width}}  {line}" for name, line in lines.items()))
    if name not in files:
        raise ArmError(f"No configuration {name!r}; there are {list(files)}.{nearest(name, list(files))}")
    return Result(str(files[name]), str(files[name]))


if __name__ == "__main__":
    sys.exit(main())
