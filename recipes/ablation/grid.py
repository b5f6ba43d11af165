"""A grid: factors with levels (or a plain list of arms) x tasks x numbers of examples x seeds, and its card.

Everything is checked before anything runs.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from trl import DPOConfig

from steertune.recipes.ablation import designs
from steertune.recipes.ablation.budget import BudgetTable
from steertune.recipes.ablation.checks import (
    check_arms,
    check_budgets,
    check_card,
    check_draws,
    check_prompts,
    check_reading,
    check_views,
)
from steertune.recipes.ablation.designs import Combination
from steertune.recipes.ablation.keys import content, data_of, digest, named_task, settings
from steertune.recipes.ablation.levels import INERT, arm_of, named, patched, with_common
from steertune.recipes.ablation.tables import Card, GridArm, GridTables, TaskTable, with_instructions
from steertune.recipes.lab.arm import check_tables
from steertune.recipes.lab.arm_files import read_tables
from steertune.recipes.lab.behaviours import Behaviour, read_behaviour
from steertune.recipes.lab.embedded import task_folder, task_names
from steertune.recipes.lab.files import ArmError, check_name, nearest, read_toml, reasons
from steertune.recipes.lab.ingredients.prompt import Prompt
from steertune.recipes.lab.paths import CONFIGS
from steertune.recipes.lab.secrets import check_settings

GRIDS = CONFIGS / "grids"
_LARGEST = 10**4  # combinations; a design is chosen from the list of all of them
_COLUMNS = {
    "key", "task", "arm", "examples", "seed", "status", "error", "scalable", "scorer", "versions", "tuned_strength",
    "matched_strength", "parameters", "steps", "pairs_read", "tokens_read", "seconds", "train_seconds", "tuning",
    "tuning_key", "tuning_seconds", "peak_memory_gb", "setting", "prompt_tokens", "notes", "frontier",
    "kl_falls", "tuning_lead", "tuning_best", "tuning_second", "tuning_landed", "taken_over",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run."""

    arm: GridArm
    task: TaskTable
    examples: int
    seed: int
    tuned_at: tuple[TaskTable, int, int]
    """Task, number of examples and seed on which its settings are chosen."""
    key: str
    """Hash of everything that decides the result."""
    tuning_key: str
    """Hash of everything that decides the choice of settings."""

    @property
    def path(self) -> Path:
        """Its folder, in the grid's folder."""
        return Path("cells") / _place(self.task, self.examples, self.seed) / self.arm.name

    @property
    def tuning_file(self) -> Path:
        """The file with the settings chosen for it and all trials, in the grid's folder."""
        return Path("tuning") / _place(*self.tuned_at) / f"{self.arm.name}.json"

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of its record."""
        return {"arm": self.arm.name, "task": self.task.label, "examples": self.examples, "seed": self.seed}

    @property
    def title(self) -> str:
        """How messages name the cell."""
        return f"{self.task.label} n={self.examples} seed={self.seed} {self.arm.name}"


@dataclass(frozen=True)
class Grid:
    """A checked grid."""

    tables: GridTables
    card: Card
    arms: list[GridArm]
    tasks: list[TaskTable]
    notes: list[str]
    """Notes about the design: its size, and which effects are aliased."""

    def to_json(self) -> dict[str, Any]:
        """What a report needs to know: the tables, the arms with their levels, and every cell with its key."""
        arms = []
        for arm in self.arms:
            tables = arm.arm.model_dump(mode="json")
            shown = {name: table for name, table in tables.items() if name not in ("data", "output")}
            arms.append({"name": arm.name, "levels": arm.levels, "tables": shown})
        return {
            "notes": self.notes,
            "tables": self.tables.model_dump(mode="json"),
            "arms": arms,
            "cells": {str(cell.path): cell.key for cell in self.cells()},
        }

    def cells(self) -> list[Cell]:
        """Every run, seed by seed, so that an unfinished grid holds whole comparisons."""
        t = self.tables
        neutral = content(t.neutral)
        data = {task.label: data_of(task.name) for task in self.tasks}
        # the instruction and the rule that leave the behaviour out of a measure of damage
        behaviours = {task.label: behaviour_of(task).model_dump(exclude={"scorer"}) for task in self.tasks}

        def cell(arm: GridArm, task: TaskTable, n: int, seed: int) -> Cell:
            at = {
                "cell": (task, n, seed),
                "arm": (task, n, t.seeds[0]),
                "grid": (self.tasks[0], sorted(t.examples)[len(t.examples) // 2], t.seeds[0]),
            }[arm.budget.per]
            tuning = digest(settings(t, neutral, arm, data[at[0].label], *at))
            matched = [t.matched.key, neutral]
            inputs = [
                data[task.label],
                *named_task(task),
                task.scorer,
                behaviours[task.label],
                n,
                seed,
                matched,
                t.generations,
                t.new_tokens,
                t.questions,
            ]
            return Cell(arm, task, n, seed, at, digest([tuning, inputs]), tuning)

        return [
            cell(arm, task, n, seed)
            for seed in t.seeds
            for task in self.tasks
            for n in t.examples
            for arm in self.arms
        ]


def load_grid(file: str | Path, data_root: Path | None = None) -> Grid:
    """Read and check a grid: a path, or the name of a file in `recipes/configs/grids/`. Task names that are relative
    paths are resolved in `data_root`.

    Raises:
        ArmError: something in it cannot be run; the message names the value and the fix.
    """
    path = Path(file) if Path(file).suffix == ".toml" else GRIDS / f"{file}.toml"
    if not path.is_file():
        names = sorted(p.stem for p in GRIDS.glob("*.toml"))
        raise ArmError(f"No grid {str(file)!r}: neither a .toml file nor one of {names}.{nearest(str(file), names)}")
    raw = read_toml(path)
    raw.setdefault("name", path.stem)
    return make_grid(raw, data_root)


def make_grid(raw: dict[str, Any], data_root: Path | None = None) -> Grid:
    """A grid from its tables; see `load_grid`."""
    check_tables("grid", raw, GridTables)
    check_settings(raw)
    try:
        tables = GridTables(**raw)
    except ValidationError as error:
        raise ArmError(reasons(error)) from error
    check_name("grid", tables.name)  # the name becomes the folder of the results
    if (card := tables.card) is None:
        raise ArmError(
            "The grid has no [card]. Write down problem, hypothesis, against (which result would count against it), "
            "baselines and affordances before it runs."
        )
    for what, values, least in (("examples", tables.examples, 1), ("seeds", tables.seeds, 0)):
        if len(set(values)) != len(values) or min(values) < least:
            raise ArmError(f"{what}={values} must list every value once, and none below {least}.")
    combinations, notes = _combinations(tables)
    arms = _arms(tables, combinations)
    check_card(tables, card, arms)
    check_budgets(card, arms)
    check_reading(tables.examples, arms)
    check_arms(tables, arms)
    tasks = find_tasks(tables.tasks, data_root)
    check_draws(tasks)
    check_views(tables, arms, tasks)
    if any(arm.arm.get(Prompt).instruction for arm in arms):
        tasks = [with_instructions(task, task_folder(task.name)) for task in tasks]
        entries = []  # the grid's entries, which keep their names
        for entry, task in zip(tables.tasks, tasks, strict=True):
            entry = TaskTable(name=entry) if isinstance(entry, str) else entry
            instructions = {"instructions": task.instructions, "instructions_by": task.instructions_by}
            entries.append(entry.model_copy(update=instructions))
        tables = tables.model_copy(update={"tasks": entries})
    check_prompts(tables, arms, tasks)
    return Grid(tables, card, arms, tasks, notes)


def _combinations(tables: GridTables) -> tuple[list[Combination], list[str]]:
    """The design's combinations, and notes about it."""
    design, factors = tables.design, {name: list(levels) for name, levels in tables.factors.items()}
    if design.kind == "arms":
        if factors:
            raise ArmError("[factors] are given, but design.kind is 'arms'. Choose 'full', 'fractional', ...")
        return [], []
    if not factors or any(len(levels) < 2 for levels in factors.values()):
        raise ArmError(f"design.kind={design.kind!r} needs [factors], each with two levels or more (got {factors}).")
    points = {"start": design.start, "end": design.end, "around": design.around}
    centre = "around" if design.around else "start"
    needed = {"add_one_in": ["start", "end"], "one_at_a_time": [centre]}.get(design.kind, [])
    for what, point in points.items():
        if point or what in needed or (design.mixtures and what != "around"):
            _check_point(f"design.{what}", point, factors)
    for factor in factors:
        if factor in _COLUMNS or factor.startswith("setting_"):
            raise ArmError(f"A factor cannot be called {factor!r}: the results have a column of that name.")
    if any(INERT in levels for levels in factors.values()):
        raise ArmError(f"{INERT!r} cannot name a level: it stands for a level without effect.")
    size = math.prod(map(len, factors.values()))
    if size > _LARGEST:
        raise ArmError(
            f"[factors] have {size:.3g} combinations. At most {_LARGEST} can be handled: give fewer factors or levels."
        )
    everything = designs.full(factors)
    if design.kind == "full":
        return everything, [f"Full factorial: {len(everything)} combinations."]
    if design.kind == "fractional":
        try:
            chosen = designs.fractional(factors, design.reduction)
        except ValueError as error:
            raise ArmError(str(error)) from error
    elif design.kind == "one_at_a_time":
        chosen = designs.one_at_a_time(factors, points[centre])
    else:
        chosen = designs.add_one_in(factors, design.start, design.end)
    count = f"{len(chosen)} of {len(everything)} combinations"
    if design.mixtures:
        added = [c for c in designs.mixtures(factors, design.start, design.end) if c not in chosen]
        chosen, count = chosen + added, f"{count}, and {len(added)} more mixtures of start and end"
    if design.kind != "fractional":
        return chosen, [f"{design.kind}: {count}; interactions are not estimated."]
    aliased = designs.aliases(chosen, factors) or ["No main effect is aliased with a pair."]
    what = f"generalised subset design, 1 in {design.reduction}: {count}"
    return chosen, [f"Fractional factorial ({what}).", *aliased]


def _check_point(what: str, point: Combination, factors: dict[str, list[str]]) -> None:
    for factor in [*factors, *point]:
        if factor not in factors:
            hint = nearest(factor, list(factors))
            raise ArmError(f"{what}: {factor!r} is not a factor. The factors are {[*factors]}.{hint}")
        if factor not in point:
            raise ArmError(f"{what} names no level of {factor!r}. Choose one of {factors[factor]}.")
        if point[factor] not in factors[factor]:
            hint = nearest(point[factor], factors[factor])
            raise ArmError(f"{what}.{factor}={point[factor]!r} must be one of {factors[factor]}.{hint}")


def _arms(tables: GridTables, combinations: list[Combination]) -> list[GridArm]:
    arms: dict[str, GridArm] = {}
    for combination in combinations:
        levels, arm = patched(tables, combination)
        name = named(levels)
        check_name("arm", name)
        if name in arms and arms[name].arm != arm:
            raise ArmError(
                f"Combination {combination} has the same name as another, {name!r}, but its arm differs: a level that "
                "is inert there changes the patch of another factor. Give that patch a `when` that does not depend on "
                "it."
            )
        arms.setdefault(name, GridArm(name, levels, arm, _budget(tables, name)))
    for file in tables.arms:
        raw = with_common(read_tables(file), tables)
        name = str(raw["name"])
        if name.casefold() in map(str.casefold, arms):  # some file systems ignore case
            raise ArmError(f"Two arms are called {name!r}.")
        arms[name] = GridArm(name, None, arm_of(raw, tables), _budget(tables, name))
    if not arms:
        raise ArmError("The grid has no arms: list them in `arms`, or give [factors] and a [design].")
    for pattern in tables.budgets:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in arms):
            raise ArmError(f"budgets: {pattern!r} matches no arm of {[*arms]}.{nearest(pattern, [*arms])}")
    for name, arm in arms.items():
        try:
            arm.arm.check_trainer(DPOConfig)
        except ArmError as error:
            raise ArmError(f"Arm {name!r}: {error}") from error
        if arm.arm.trainer.get("max_steps") != 0 and "learning_rate" not in arm.arm.trainer:
            raise ArmError(f"Arm {name!r} has no trainer.learning_rate, around which the budget would search.")
    return list(arms.values())


def _budget(tables: GridTables, name: str) -> BudgetTable:
    """The budget of an arm: the grid's, changed by the entries of `[budgets]` whose pattern matches."""
    changed = [change for pattern, change in tables.budgets.items() if fnmatch.fnmatchcase(name, pattern)]
    values = tables.budget.model_dump()
    for change in changed:
        check_tables(f"budgets.{name}", change, BudgetTable)
        values |= change
    try:
        return BudgetTable(**values)
    except ValidationError as error:
        raise ArmError(f"budgets.{name}: {reasons(error)}") from error


def find_tasks(entries: Sequence[str | TaskTable], data_root: Path | None = None) -> list[TaskTable]:
    """Tasks with their labels and the paths of their data. Names that are relative paths are resolved in `data_root`.

    Raises:
        ArmError: two tasks have the same label, or a label cannot name a folder.
    """
    tasks: dict[str, TaskTable] = {}
    for entry in entries:
        task = TaskTable(name=entry) if isinstance(entry, str) else entry
        label, name = task.called, task.name
        if data_root is not None and name not in task_names() and (data_root / name).exists():
            name = str(data_root / name)
        check_name("task", label)
        if label.casefold() in map(str.casefold, tasks):
            raise ArmError(f"Two tasks are called {label!r}: give one a label of its own.")
        task = task.model_copy(update={"name": name, "label": label})
        scorer = behaviour_of(task).scorer_table(task.scorer)
        tasks[label] = task.model_copy(update={"scorer": scorer})
    return list(tasks.values())


def behaviour_of(task: TaskTable) -> Behaviour:
    """How a task's behaviour is recognised. The file in the task's folder does not apply to other columns or swapped
    answers, which show another behaviour."""
    return Behaviour() if task.reverse or task.columns else read_behaviour(task.name)


def _place(task: TaskTable, examples: int, seed: int) -> Path:
    return Path(task.label) / f"n{examples}" / f"seed{seed}"


def describe(cells: Sequence[Cell]) -> str:
    """The number of cells in words, with the numbers of arms, tasks, examples and seeds."""
    count = {what: len({getattr(cell, what) for cell in cells}) for what in ("examples", "seed")}
    arms, tasks = len({cell.arm.name for cell in cells}), len({cell.task.label for cell in cells})
    return (
        f"{len(cells)} cells: {arms} arms x {tasks} tasks x {count['examples']} numbers of examples x "
        f"{count['seed']} seeds"
    )
