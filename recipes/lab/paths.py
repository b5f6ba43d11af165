"""Folders of the files that recipes read."""

from __future__ import annotations

from pathlib import Path

RECIPES = Path(__file__).parents[1]
CONFIGS = RECIPES / "configs"
LAUNCHES = CONFIGS / "accelerate"
"""Configurations of `accelerate launch`."""
TASKS = RECIPES / "tasks"


def modules_in(folder: str) -> list[str]:
    """The public modules of a folder of the library such as `adapters/exports`: the valid names in a command."""
    return sorted(file.stem for file in (RECIPES.parent / folder).glob("[!_]*.py"))
