"""Arm files: where they are, what they inherit, and their former names.

    # my_arm.toml
    extends = "lora_dpo"  # a name in configs/arms/, or a .toml file beside this one

    [adapter]
    r = 2

An arm that extends another contains only what differs; see `merge_tables` for how the two are merged.
"""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

from steertune.recipes.lab.files import ArmError, nearest, read_toml
from steertune.recipes.lab.paths import CONFIGS

ARMS = CONFIGS / "arms"
# the key that names the method whose options follow
_CHOOSERS = {"adapter": "type", "loss": "name", "augmentation": "name"}
_NOT_INHERITED = ("name", "output")  # two arms must not write into one folder
RENAMED_TABLES = {"proliferation": "augmentation", "biases": "inductive_biases"}


def read_tables(file: str | Path) -> dict[str, Any]:
    """The tables of an arm with everything it inherits, named after its file.

    Raises:
        ArmError: no such arm, no such parent, arms that extend each other in a circle, or broken TOML.
    """
    path = _arm_file(str(file), Path(), f"No arm {str(file)!r}")
    return {"name": path.stem, **_inherited(path, [])}


def merge_tables(base: dict[str, Any], patch: dict[str, Any], inside: str = "") -> dict[str, Any]:
    """`base` with `patch` on top, key by key. `inside` is the key that holds them; "" for a whole arm.

    A patch that names another adapter, loss, augmentation or view replaces the whole table, since the options of one
    do not apply to another. The empty table `{}` resets a key to its default.
    """
    merged = copy.deepcopy(base)
    for key, value in patch.items():
        chooser = "name" if inside == "views" else _CHOOSERS.get(key)
        if value == {} and key in merged and not isinstance(merged[key], dict):
            del merged[key]
        elif isinstance(value, dict) and value and isinstance(merged.get(key), dict) and chooser not in value:
            merged[key] = merge_tables(merged[key], value, key)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def renamed_tables(tables: dict[str, Any]) -> dict[str, Any]:
    """The tables under their current names; former names work for one release, with a FutureWarning."""
    tables = dict(tables)
    for old, new in RENAMED_TABLES.items():
        if old in tables:
            warnings.warn(f"The table [{old}] is now called [{new}].", FutureWarning, stacklevel=3)
            tables = merge_tables(tables, {new: tables.pop(old)})
    return tables


def _inherited(path: Path, children: list[Path]) -> dict[str, Any]:
    """The tables of a file merged into those of its parents. `children` are the files that led here, each extending
    the next."""
    if path in children:
        circle = " -> ".join(child.stem for child in [*children[children.index(path) :], path])
        raise ArmError(f"Arms extend each other in a circle: {circle}. Remove one of these `extends`.")
    tables = renamed_tables(read_toml(path))
    parent = tables.pop("extends", None)
    if parent is None:
        return tables
    if not isinstance(parent, str):
        raise ArmError(
            f"{path}: extends must be a string (got {parent!r}). Give one name in configs/arms/, or one .toml file."
        )
    parent_file = _arm_file(parent, path.parent, f"{path}: extends={parent!r} does not exist")
    inherited = _inherited(parent_file, [*children, path])
    for key in _NOT_INHERITED:
        inherited.pop(key, None)
    return merge_tables(inherited, tables)


def _arm_file(name: str, folder: Path, problem: str) -> Path:
    """The file of an arm: a path that ends in .toml, relative to `folder`, or a name in configs/arms/. `problem` is
    the start of the error message if there is no such file."""
    path = folder / name if Path(name).suffix == ".toml" else ARMS / f"{name}.toml"
    if path.is_file():
        return Path(os.path.abspath(path))  # a symbolic link keeps its own name
    # arms of one vector were called bias_* before they were called vector_*
    renamed = path.with_name(path.name.replace("bias_", "vector_", 1))
    if path.parent == ARMS and path.name.startswith("bias_") and renamed.is_file():
        warnings.warn(f"The arm {name!r} is now called {renamed.stem!r}.", FutureWarning, stacklevel=4)
        return renamed
    names = sorted(file.stem for file in ARMS.glob("*.toml"))
    raise ArmError(f"{problem}.{nearest(name, names)} It is neither a .toml file nor one of {names}.")
