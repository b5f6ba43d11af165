"""The vectors that come with the package: one for every embedded task, for the embedded model.

    [adapter]
    form = "span"
    basis = "embedded"                            # all of them, or some: ["embedded/warm", "embedded/formal"]

They are ordinary adapter folders, made by `steertune zoo`, and all are added at the same layer, so that they can be
summed (`adapters/basis.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steertune.recipes.lab.files import ArmError, nearest
from steertune.recipes.lab.paths import RECIPES

ZOO = RECIPES / "zoo"
EMBEDDED = "embedded"


def names() -> list[str]:
    """Names of the vectors: the tasks that they were trained on."""
    return sorted(file.parent.name for file in ZOO.glob("*/adapter_config.json"))


def folder(name: str) -> Path:
    """The adapter folder of a vector.

    Raises:
        ArmError: no vector has this name; the message suggests the nearest.
    """
    if name not in names():
        available = ", ".join(names())
        raise ArmError(f"No embedded vector is called {name!r}. Available: {available}.{nearest(name, names())}")
    return ZOO / name


def basis(value: str | Sequence[str]) -> str | list[str]:
    """A basis of `form="span"` with `embedded` and `embedded/NAME` replaced by adapter folders.

    Raises:
        ArmError: no embedded vector has that name.
    """
    if value == EMBEDDED:
        return [str(folder(name)) for name in names()]
    if isinstance(value, str):
        return [_folder_of(value)] if value.startswith(f"{EMBEDDED}/") else value
    return [_folder_of(one) for one in value]


def as_words(word: str) -> list[str]:
    """`NAME=FOLDER` for what a command line calls embedded vectors; other words stay as they are.

    `embedded` is all of them, `embedded/warm` one, and `kind=embedded/warm` one under another name.

    Raises:
        ArmError: no embedded vector has such a name.
    """
    if word == EMBEDDED:
        return [f"{name}={folder(name)}" for name in names()]
    name, equals, value = word.rpartition("=")
    place = _folder_of(value)
    return [f"{name if equals else Path(place).name}={place}"] if place != value else [word]


def without(value: Any, task: str) -> Any:
    """An arm's basis without the embedded vector of a task, since that was trained on more examples of the task."""
    if value == EMBEDDED:
        value = [f"{EMBEDDED}/{name}" for name in names()]
    return [one for one in value if one != f"{EMBEDDED}/{task}"] if isinstance(value, list) else value


def _folder_of(one: str) -> str:
    prefix, slash, name = one.partition("/")
    return str(folder(name)) if slash and prefix == EMBEDDED else one
