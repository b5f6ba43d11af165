"""The path of a configuration for `accelerate launch`.

    accelerate launch --config_file $(steertune config zero2) -m steertune.recipes.train

Without a name it says what there is. GPUs: single_gpu, multi_gpu, fsdp1, fsdp2, zero1, zero2, zero3 (eight processes:
`--num_processes` says otherwise). Two processes on a CPU, to try things: cpu_ddp, cpu_zero1, cpu_zero2, cpu_zero3.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from steertune.recipes.lab.arm import ArmError, nearest
from steertune.recipes.lab.processes import LAUNCHES, command


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="config", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", nargs="?", help="without .yaml")
    options = parser.parse_args(argv)
    files = {file.stem: file for file in sorted(LAUNCHES.glob("*.yaml"))}
    if options.name is None:
        width = max(map(len, files))
        for name, file in files.items():
            print(f"{name:<{width}}  {file.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")
        return 0
    if options.name not in files:
        raise ArmError(
            f"No configuration {options.name!r}; there are {list(files)}.{nearest(options.name, list(files))}"
        )
    print(files[options.name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
