"""Folders of the files that recipes read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

RECIPES = Path(__file__).parents[1]
CONFIGS = RECIPES / "configs"
LAUNCHES = CONFIGS / "accelerate"
"""Configurations of `accelerate launch`."""
TASKS = RECIPES / "tasks"

_PATHS = ("--data-root", "--folder", "--reuse", "--known")  # options whose value is a path


def without_paths(words: Sequence[str]) -> list[str]:
    """A command line without the paths of this machine, which mean nothing elsewhere: the value of an option becomes
    its name in capitals, any other absolute path the name of its file."""
    shown: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        if shown and shown[-1] in _PATHS:
            shown.append(shown[-1][2:].upper())
        elif equals and option in _PATHS:
            shown.append(f"{option}={option[2:].upper()}")
        elif equals and option.startswith("--") and Path(value).is_absolute():
            shown.append(f"{option}={Path(value).name}")
        else:
            shown.append(Path(word).name if Path(word).is_absolute() else word)
    return shown


def modules_in(folder: str) -> list[str]:
    """The public modules of a folder of the library such as `adapters/exports`: the valid names in a command."""
    return sorted(file.stem for file in (RECIPES.parent / folder).glob("[!_]*.py"))
