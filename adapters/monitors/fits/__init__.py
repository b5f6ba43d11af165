"""Methods that fit the direction of a monitor. Each file of this folder is one method, named by the file. It defines

    fit(bad, innocent) -> direction

from pooled states `(bad rows, d)` and `(innocent rows, d)` to a vector `(d,)` that points towards the bad rows. The
classes need not be balanced: no innocent row is dropped, because probes of few bad rows benefit from every further
innocent row.
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
