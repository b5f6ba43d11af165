"""Hashes of everything that decides a cell's result, by which a folder with other settings is recognised."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from steertune.recipes.ablation.tables import GridArm, GridTables, TaskTable
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.ingredients.prompt import Prompt

VERSION = 6  # of the cells; raised when a cell of the same grid would come out differently


def settings(
    tables: GridTables, neutral: str, arm: GridArm, data: str, task: TaskTable, examples: int, seed: int
) -> dict[str, Any]:
    """Everything that decides which settings are chosen. Paths are left out, because they differ between machines."""
    core = ("model", "adapter", "loss", "trainer")
    parts = {name: table for name, table in arm.arm.model_dump(mode="json").items() if name in core}
    parts["model"].pop("threads")
    if parts["adapter"].get("type", "steering_vector") == "steering_vector":
        parts["unit"] = "stream"  # the unit of learning rates; cells without it had absolute ones
    parts |= {name: ingredient.key(arm.arm) for name, ingredient in arm.arm.ingredients.items() if ingredient}
    if arm.arm.get(Prompt).instruction:
        parts["instructions"] = task.instructions
    if arm.arm.data.times != 1:
        parts["times"] = arm.arm.data.times
    settings = {
        "version": VERSION,
        "arm": {**parts, "pairing": arm.arm.data.pairing},
        "budget": arm.budget.model_dump(mode="json"),
        "task": [*named_task(task), data],
        "examples": examples,
        "seed": seed,
        "splits": tables.splits.model_dump(mode="json"),
    }
    if arm.budget.strengths == "matched":
        settings["matched"] = [tables.matched.key, neutral]
    return settings


def named_task(task: TaskTable) -> list[Any]:
    form = [] if task.format == "auto" else [task.format]
    return [task.label, task.reverse, task.columns, *([task.draw] if task.draw else []), *form]


def content(file: str | None) -> str:
    """Hash of a local file, whose path differs between machines; the name of anything else."""
    if file is None:
        return ""
    path = Path(file)
    if path.suffix and not path.is_file():
        raise ArmError(f"neutral={file!r}: no such file.")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else file


def data_of(name: str) -> str:
    """Hash of a task's files; "" for a data set on the Hub, which its label names."""
    from steertune.recipes.lab.embedded import task_folder

    path = task_folder(name)
    if not path.exists():
        return ""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256(b"" if path.is_dir() else b"divided by a hash of the prompt")
    for file in files:
        if file.suffix in (".json", ".jsonl", ".csv", ".parquet"):
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
