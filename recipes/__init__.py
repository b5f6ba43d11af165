"""The recipes: each is a module with `main(argv=None)`."""

import os
import sys
from pathlib import Path
from typing import Any

from steertune.recipes.lab.quiet import quiet_imports


def _say_interrupted(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Exception hook of a command: an interrupt during the slow imports prints no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nInterrupted before anything began.", file=sys.stderr, flush=True)
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


# a package is imported before its module runs: sys.argv[0] is still `-m`, not the file's name
if Path(sys.argv[0] if sys.argv else "").name in ("-m", "steertune"):
    sys.excepthook = _say_interrupted
quiet_imports()
