"""A grid: factors with levels (or a plain list of arms) x tasks x numbers of examples x seeds, and its card.

Everything is checked before anything runs. A level is a small patch of the base arm:

    [factors.form]
    bias = { adapter.form = "bias" }
    lora = { adapter = { type = "lora", r = 8, target_modules = "all-linear" }, trainer.learning_rate = 5e-4 }

    [factors.init]
    zeros = {}
    mean_difference = [{ when = { form = "lora" }, inert = true }, { adapter.init = "mean_difference" }]

Of a list the first entry counts whose `when` fits. `inert` says that the level means nothing there; combinations that
differ only in inert levels are one arm. Patching `adapter.type` or `loss.name` replaces the whole table.
"""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError
from trl import DPOConfig

from steertune.recipes.ablation import designs
from steertune.recipes.ablation.budget import BudgetTable
from steertune.recipes.ablation.designs import Combination
from steertune.recipes.ablation.splits import SplitTable
from steertune.recipes.arm import (
    Arm,
    ArmError,
    known,
    known_tables,
    make_arm,
    nearest,
    read_tables,
    read_toml,
    reasons,
)

GRIDS = Path(__file__).parents[1] / "grids"
VERSION = 1  # of the cells; raised when a cell of the same grid would come out differently
INERT = "-"
_COLUMNS = {
    "version", "key", "task", "arm", "examples", "seed", "status", "error", "kl", "perplexity", "accuracy", "margin",
    "margins", "margin_gain", "moved_wrong", "behaviour", "judgements_failed", "repetition", "answers", "scalable",
    "parameters", "steps", "pairs_read", "tokens_read", "seconds", "train_seconds", "tuning", "tuning_seconds",
    "peak_memory_gb", "levels", "setting",
}  # fmt: skip
_PATCHED = ["adapter", "loss", "trainer", "data"]

Measure = Literal["accuracy", "matched_accuracy", "margin_gain", "matched_margin_gain", "behaviour"]


class Card(BaseModel, extra="forbid"):
    """`[card]`: what the grid is for, written before it runs. A grid without one does not run."""

    problem: str = Field(min_length=1)
    hypothesis: str = Field(min_length=1)
    against: str = Field(min_length=1)
    """Which result would count against the hypothesis."""
    baselines: str = Field(min_length=1)
    affordances: dict[str, str] = Field(min_length=1)
    """Arm (or pattern such as `lora*`) -> the data, labels, model access and compute it may use."""
    unequal_budgets: str | None = None
    """Why some arms get another tuning budget; without it such a grid is refused."""


class Claim(BaseModel, extra="forbid"):
    """`[claim]`: the hypothesis as a comparison, which decides whether the result counts for or against."""

    better: str
    than: str
    measure: Measure = "matched_accuracy"
    alpha: float = Field(default=0.05, gt=0, lt=1)


class DesignTable(BaseModel, extra="forbid"):
    """`[design]`: which combinations of levels are run."""

    kind: Literal["full", "fractional", "one_at_a_time", "add_one_in", "arms"]
    reduction: int = 2
    start: Combination = {}
    """Level of every factor where add-one-in starts, and what Shapley shares count from."""
    end: Combination = {}
    around: Combination = {}
    """Where one-at-a-time starts, if not at `start`."""
    mixtures: bool = False
    """Add every mixture of start and end to a fractional or one-at-a-time design, for exact Shapley shares."""


class TaskTable(BaseModel, extra="forbid"):
    """One entry of `tasks`: a name, or a table with what measures the behaviour."""

    name: str
    label: str = ""
    reverse: bool = False
    columns: dict[Literal["prompt", "chosen", "rejected"], str] = {}
    """Pairs made of other columns: what each side says, with `{column}` for a row's text (the first, of a list)."""
    scorer: dict[str, Any] = {"kind": "classifier"}


class MatchedTable(BaseModel, extra="forbid"):
    """`[matched]`: the strength at which arms are compared fairly, as their KL to the base on neutral text."""

    kl: float = Field(default=0.1, gt=0)
    largest_strength: float = Field(default=64.0, gt=0)


class GridTables(BaseModel, extra="forbid"):
    """The file."""

    name: str
    base: str = "bias_dpo"
    arms: list[str] = []
    tasks: list[str | TaskTable] = Field(min_length=1)
    examples: list[int] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    neutral: str | None = None
    """A file of neutral prompts and completions; none: the embedded one."""
    model: dict[str, Any] = {}
    trainer: dict[str, Any] = {}
    """Training arguments of all arms that are trained."""
    loss: dict[str, Any] = {}
    """Options of the loss for all arms."""
    generations: int = Field(default=16, ge=0)
    new_tokens: int = Field(default=32, ge=1)
    card: Card | None = None
    claim: Claim | None = None
    design: DesignTable = DesignTable(kind="arms")
    factors: dict[str, dict[str, Any]] = {}
    splits: SplitTable = SplitTable()
    budget: BudgetTable = BudgetTable()
    budgets: dict[str, dict[str, Any]] = {}
    matched: MatchedTable = MatchedTable()


@dataclass(frozen=True)
class GridArm:
    """An arm of a grid: its name, its level of every factor (None for an arm from a file), its tables and budget."""

    name: str
    levels: Combination | None
    arm: Arm
    budget: BudgetTable


@dataclass(frozen=True)
class Cell:
    """One run."""

    arm: GridArm
    task: TaskTable
    examples: int
    seed: int
    key: str
    """Hash of everything that decides the result."""
    tuning_key: str
    """Hash of everything that decides the settings chosen."""

    @property
    def path(self) -> Path:
        """Its folder, in the grid's folder."""
        return Path("cells") / self.task.label / f"n{self.examples}" / f"seed{self.seed}" / self.arm.name

    @property
    def title(self) -> str:
        """For messages."""
        return f"{self.task.label} n={self.examples} seed={self.seed} {self.arm.name}"


@dataclass(frozen=True)
class Grid:
    """A checked grid."""

    tables: GridTables
    card: Card
    arms: list[GridArm]
    tasks: list[TaskTable]
    notes: list[str]
    """About the design: its size, what is aliased."""

    def cells(self) -> list[Cell]:
        """Every run, seed by seed, so that an unfinished grid holds whole comparisons."""
        t = self.tables
        neutral = _content(t.neutral)
        return [
            Cell(arm, task, n, seed, *_keys(t, neutral, arm, task, n, seed))
            for seed in t.seeds
            for task in self.tasks
            for n in t.examples
            for arm in self.arms
        ]


def load_grid(file: str | Path, data_root: Path | None = None) -> Grid:
    """Read and check a grid: a path, or the name of a file in `recipes/grids/`.

    Args:
        file: The grid.
        data_root: Where task names that are relative paths start.

    Raises:
        ArmError: anything in it that cannot be run; the message names the value and the fix.
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
    known_tables("grid", raw, GridTables)
    try:
        tables = GridTables(**raw)
    except ValidationError as error:
        raise ArmError(reasons(error)) from error
    if tables.card is None:
        raise ArmError(
            "The grid has no [card]. Write down problem, hypothesis, against (which result would count against it), "
            "baselines and affordances before it runs."
        )
    for what, values in (("examples", tables.examples), ("seeds", tables.seeds)):
        if len(set(values)) != len(values) or min(values) < (1 if what == "examples" else 0):
            raise ArmError(f"{what}={values}: every value once, and none below {1 if what == 'examples' else 0}.")
    combinations, notes = _combinations(tables)
    arms = _arms(tables, combinations)
    _check_card(tables.card, tables.claim, arms)
    _check_budgets(tables.card, arms)
    return Grid(tables, tables.card, arms, _tasks(tables, data_root), notes)


def _combinations(tables: GridTables) -> tuple[list[Combination], list[str]]:
    """The design's combinations, and what to know about it."""
    design, factors = tables.design, {name: list(levels) for name, levels in tables.factors.items()}
    if design.kind == "arms":
        if factors:
            raise ArmError("[factors] are given, but design.kind is 'arms'. Choose 'full', 'fractional', ...")
        return [], []
    if not factors or any(len(levels) < 2 for levels in factors.values()):
        raise ArmError(f"design.kind={design.kind!r} needs [factors], each with two levels or more: {factors}.")
    around = design.around or design.start
    needed = {"add_one_in": ("start", "end"), "one_at_a_time": ("around",)}.get(design.kind, ())
    for what, point in (("start", design.start), ("end", design.end), ("around", around)):
        if point or what in needed or (design.mixtures and what != "around"):
            _check_point(f"design.{what if what != 'around' or design.around else 'start'}", point, factors)
    for factor in factors:
        if factor in _COLUMNS or factor.startswith(("base_", "matched_", "setting_")):
            raise ArmError(f"A factor cannot be called {factor!r}, like a column of the results.")
    if any(INERT in levels for levels in factors.values()):
        raise ArmError(f"{INERT!r} is no name for a level: it stands for a level that means nothing.")
    everything = designs.full(factors)
    if design.kind == "full":
        return everything, [f"Full factorial: {len(everything)} combinations."]
    if design.kind == "fractional":
        try:
            chosen = designs.fractional(factors, design.reduction)
        except ValueError as error:
            raise ArmError(str(error)) from error
    elif design.kind == "one_at_a_time":
        chosen = designs.one_at_a_time(factors, around)
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
            raise ArmError(f"{what}: no factor {factor!r} in {[*factors]}.{nearest(factor, list(factors))}")
        if factor not in point:
            raise ArmError(f"{what} names no level of {factor!r}: one of {factors[factor]}.")
        if point[factor] not in factors[factor]:
            hint = nearest(point[factor], factors[factor])
            raise ArmError(f"{what}.{factor}={point[factor]!r} is no level: there are {factors[factor]}.{hint}")


def _arms(tables: GridTables, combinations: list[Combination]) -> list[GridArm]:
    found: dict[str, GridArm] = {}
    for combination in combinations:
        levels, arm = patched(tables, combination)
        name = ",".join(f"{factor}={level}" for factor, level in levels.items())
        if name in found and found[name].arm != arm:
            raise ArmError(
                f"Combination {combination} is called {name!r} like another, but its arm differs: a level that is "
                "inert there changes the patch of another factor. Give that patch a `when` that does not depend on it."
            )
        found.setdefault(name, GridArm(name, levels, arm, _budget(tables, name)))
    for file in tables.arms:
        raw = _common(read_tables(file), tables)
        name = str(raw["name"])
        if name in found:
            raise ArmError(f"Two arms are called {name!r}.")
        found[name] = GridArm(name, None, make_arm(raw), _budget(tables, name))
    if not found:
        raise ArmError("The grid has no arms: list them in `arms`, or give [factors] and a [design].")
    for pattern in tables.budgets:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in found):
            raise ArmError(f"budgets: {pattern!r} fits no arm of {[*found]}.{nearest(pattern, [*found])}")
    for name, arm in found.items():
        try:
            arm.arm.check_trainer(DPOConfig)
        except ArmError as error:
            raise ArmError(f"Arm {name!r}: {error}") from error
        if arm.arm.trainer.get("max_steps") != 0 and "learning_rate" not in arm.arm.trainer:
            raise ArmError(f"Arm {name!r} has no trainer.learning_rate, around which the budget would search.")
        _check_name("arm", name)
    return list(found.values())


def _check_name(what: str, name: str) -> None:
    """Names become folders, so nothing in them may lead elsewhere."""
    if not re.fullmatch(r"[\w=,+-][\w=,+.-]*", name):
        raise ArmError(
            f"{what} {name!r} cannot name a folder: use letters, digits, '_', '-' and '.', no '.' in front."
        )


def _common(raw: dict[str, Any], tables: GridTables) -> dict[str, Any]:
    """An arm with what the grid says for all; an arm that is not trained stays so."""
    common: dict[str, Any] = {"model": tables.model, "loss": tables.loss}
    if raw.get("trainer", {}).get("max_steps") != 0:
        common["trainer"] = tables.trainer
    return _merge(raw, {name: table for name, table in common.items() if table})


def patched(tables: GridTables, combination: Combination) -> tuple[Combination, Arm]:
    """The base arm with a combination's patches, and the combination with `-` for inert levels.

    Raises:
        ArmError: a patch that does not fit.
    """
    raw = _common(read_tables(tables.base), tables)
    levels: Combination = {}
    for factor, level in combination.items():
        entry = _entry(factor, level, tables.factors[factor][level], combination, tables)
        if entry.pop("inert", False):
            levels[factor] = INERT
            continue
        levels[factor] = level
        raw = _merge(raw, entry)
    try:
        return levels, make_arm(raw)
    except ArmError as error:
        raise ArmError(f"Combination {combination}: {error}") from error


def _entry(factor: str, level: str, patch: Any, combination: Combination, tables: GridTables) -> dict[str, Any]:
    """The patch of a level that counts for a combination."""
    for option in patch if isinstance(patch, list) else [patch]:
        if not isinstance(option, dict):
            raise ArmError(f"factors.{factor}.{level}={patch!r}: a table, or a list of tables, is expected.")
        option = copy.deepcopy(option)
        when = option.pop("when", {})
        where = f"factors.{factor}.{level}"
        if not isinstance(when, dict):
            raise ArmError(f'{where}: when={when!r} must be a table, such as {{ form = "lora" }}.')
        known(where, option, ["inert", *_PATCHED])
        known(f"{where}.data", option.get("data", {}), ["pairing"])  # the grid itself says the rest
        for other, wanted in when.items():
            if not isinstance(wanted, str | list):
                raise ArmError(f"{where}: when.{other}={wanted!r} must be a level or a list of levels.")
            if other not in tables.factors:
                raise ArmError(f"{where}: when names {other!r}, the factors are {[*tables.factors]}.")
            missing = set([wanted] if isinstance(wanted, str) else wanted) - set(tables.factors[other])
            if missing:
                raise ArmError(f"{where}: {sorted(missing)} are no levels of {other!r}.")
        if all(combination[other] in ([w] if isinstance(w, str) else w) for other, w in when.items()):
            return option
    raise ArmError(f"factors.{factor}.{level} says nothing for {combination}: add a last entry without `when`.")


def _merge(base: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """`base` with `patch` on top, table by table; another adapter or loss replaces its table."""
    merged = copy.deepcopy(base)
    for key, value in patch.items():
        chooser = {"adapter": "type", "loss": "name"}.get(key)
        if isinstance(value, dict) and isinstance(merged.get(key), dict) and chooser not in value:
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _budget(tables: GridTables, name: str) -> BudgetTable:
    """The budget of an arm: the grid's, changed by the entries of `[budgets]` whose pattern fits."""
    changed = [change for pattern, change in tables.budgets.items() if fnmatch.fnmatchcase(name, pattern)]
    values = tables.budget.model_dump()
    for change in changed:
        known_tables(f"budgets.{name}", change, BudgetTable)
        values |= change
    try:
        return BudgetTable(**values)
    except ValidationError as error:
        raise ArmError(f"budgets.{name}: {reasons(error)}") from error


def _check_budgets(card: Card, arms: list[GridArm]) -> None:
    different = [arm.name for arm in arms if arm.budget != arms[0].budget]
    if different and not card.unequal_budgets:
        raise ArmError(
            f"Arms {different} have another tuning budget than {arms[0].name!r}, so a difference could be the "
            "tuning's. Give all arms the same [budget], or say why not in card.unequal_budgets."
        )


def _check_card(card: Card, claim: Claim | None, arms: list[GridArm]) -> None:
    names = [arm.name for arm in arms]
    for pattern in card.affordances:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ArmError(f"card.affordances: {pattern!r} fits no arm of the grid: {names}.{nearest(pattern, names)}")
    for name in names:
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in card.affordances):
            raise ArmError(f"card.affordances leaves out arm {name!r}: which data, labels and compute does it use?")
    for what in ("better", "than") if claim else ():
        name = getattr(claim, what)
        if name not in names:
            raise ArmError(f"claim.{what}={name!r} is no arm of the grid: {names}.{nearest(name, names)}")


def _tasks(tables: GridTables, data_root: Path | None) -> list[TaskTable]:
    from steertune.recipes.embedded import task_names

    found: dict[str, TaskTable] = {}
    for entry in tables.tasks:
        task = TaskTable(name=entry) if isinstance(entry, str) else entry
        label = task.label or Path(task.name).name + ("_reversed" if task.reverse else "")
        name = task.name
        if data_root is not None and name not in task_names() and (data_root / name).exists():
            name = str(data_root / name)
        _check_name("task", label)
        if label in found:
            raise ArmError(f"Two tasks are called {label!r}: give one a label of its own.")
        found[label] = task.model_copy(update={"name": name, "label": label})
    return list(found.values())


def _keys(
    tables: GridTables, neutral: str, arm: GridArm, task: TaskTable, examples: int, seed: int
) -> tuple[str, str]:
    """Hashes of everything that decides a cell's result, and its settings. Paths differ between machines: left out."""
    own = arm.arm.model_dump(mode="json", include={"model", "adapter", "loss", "trainer"})
    own["model"].pop("threads")
    settings = {
        "version": VERSION,
        "arm": {**own, "pairing": arm.arm.data.pairing},
        "budget": arm.budget.model_dump(mode="json"),
        "task": [task.label, task.reverse],
        "examples": examples,
        "seed": tables.seeds[0] if arm.budget.per == "arm" else seed,
        "splits": tables.splits.model_dump(mode="json"),
    }
    matched = [tables.matched.model_dump(mode="json"), neutral]
    result = [settings, seed, task.scorer, matched, tables.generations, tables.new_tokens]
    return _hash(result), _hash(settings)


def _content(file: str | None) -> str:
    """Hash of a local file, which may stand elsewhere on another machine; the name of anything else."""
    if file is None:
        return ""
    path = Path(file)
    if path.suffix and not path.is_file():
        raise ArmError(f"neutral={file!r}: no such file.")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else file


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def describe(cells: Sequence[Cell]) -> str:
    """How many of what."""
    count = {what: len({getattr(cell, what) for cell in cells}) for what in ("examples", "seed")}
    arms, tasks = len({cell.arm.name for cell in cells}), len({cell.task.label for cell in cells})
    return (
        f"{len(cells)} cells: {arms} arms x {tasks} tasks x {count['examples']} numbers of examples x "
        f"{count['seed']} seeds"
    )
