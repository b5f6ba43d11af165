"""How the direction of a monitor is fitted. Each file of this folder is one method, named by the file. It defines

    fit(bad, innocent) -> direction

from pooled states `(bad rows, d)` and `(innocent rows, d)` to a vector `(d,)` on whose side the bad rows are. The two
need not be equally many: no innocent row is dropped to balance them, because probes of few bad rows gain from every
further innocent one.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from ...registry import choose, file_names


def names() -> list[str]:
    """The names of all methods: the files of this folder."""
    return file_names(__path__[0])


def get(name: str) -> ModuleType:
    """The module of a method, with `fit`.

    Raises:
        ValueError: the name is unknown; the message suggests the nearest one.
    """
    choose("method", name, names())
    return importlib.import_module(f"{__name__}.{name}")
