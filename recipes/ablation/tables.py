"""The tables of a grid's file, their keys and types."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from steertune.recipes.ablation.budget import BudgetTable
from steertune.recipes.ablation.designs import Combination
from steertune.recipes.lab import measures
from steertune.recipes.lab.arm import Arm, check_keys
from steertune.recipes.lab.files import ArmError, read_toml
from steertune.recipes.lab.splits import SplitTable
from steertune.recipes.lab.tables import Part


class Card(BaseModel, extra="forbid", strict=True):
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


class Claim(BaseModel, extra="forbid", strict=True):
    """`[claim]`: the hypothesis as a comparison, which decides whether the result counts for or against."""

    better: str
    than: str
    measure: str = "accuracy"
    """The name of a file in `recipes/lab/measures/`."""
    strength: Literal["tuned", "matched", "frontier"] = "matched"
    """Where arms are compared: at the strength that the tuning chose, at the grid's KL to the base, or by the mean
    over the KLs of the frontier."""
    tasks: Literal["sample", "fixed"] = "sample"
    """Whether the grid's tasks stand for others like them, so that intervals are over tasks, or only for
    themselves."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    margin: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """How far ahead `better` is claimed to be: clearly more counts for the claim, clearly less against it."""
    recovers: float | None = Field(default=None, gt=0, le=1)
    """What share of `than`'s gain over the base model `better` is claimed to reach, in place of being better."""
    factor: str | None = None
    """The factor that is claimed to have the largest share of the gap; a larger share of another counts against it."""

    @model_validator(mode="before")
    @classmethod
    def _read_measure(cls, table: Any) -> Any:
        """Read `matched_accuracy`, the old way to write `measure = "accuracy"`, `strength = "matched"`."""
        if not isinstance(table, dict) or not isinstance(table.get("measure"), str):
            return table
        name = table["measure"]
        if name.startswith("matched_"):
            return {**table, "measure": name.removeprefix("matched_"), "strength": "matched"}
        if "strength" not in table:
            raise ValueError(f'measure={name!r} needs a strength: set strength = "matched" or strength = "tuned"')
        return table

    @field_validator("measure")
    @classmethod
    def _known_measure(cls, name: str) -> str:
        return measures.get(name).name

    @property
    def sample(self) -> bool:
        """Whether tasks are treated as a sample."""
        return self.tasks == "sample"

    @property
    def column(self) -> str:
        """The column of the cells that the claim is about."""
        return f"{self.measure}@{self.strength}"

    @property
    def label(self) -> str:
        """The measure and strength of the claim, in words."""
        return measure_label(self.measure, self.strength)


AT = {"tuned": "at the tuned strength", "matched": "at matched KL", "frontier": "over the frontier of KLs"}


def measure_label(measure: str, strength: str) -> str:
    """A measure at a strength in words, with its unit."""
    of_name = measures.get(measure)
    unit = f" ({of_name.unit})" if of_name.unit else ""
    return f"{of_name.title}{unit} {AT[strength]}"


class DesignTable(BaseModel, extra="forbid", strict=True):
    """`[design]`: which combinations of levels are run."""

    kind: Literal["full", "fractional", "one_at_a_time", "add_one_in", "arms"]
    reduction: int = 2
    start: Combination = {}
    """Level of every factor where add-one-in and Shapley shares start."""
    end: Combination = {}
    around: Combination = {}
    """Where one-at-a-time starts, if not at `start`."""
    mixtures: bool = False
    """Add every mixture of start and end to a fractional or one-at-a-time design, for exact Shapley shares."""


class TaskTable(BaseModel, extra="forbid", strict=True):
    """One entry of `tasks`: a name, or a table that also says how its rows are read and how its behaviour is
    measured."""

    name: str
    label: str = ""
    reverse: bool = False
    columns: dict[Part, str] = {}
    """The columns that pairs are made of: a column's name, or a text with `{column}` in place of a row's text (the
    first one of a list). If left out, columns are recognised."""
    format: Literal["auto", "conversation", "text"] = "auto"
    """What texts become, as in `[data]` of an arm."""
    draw: int = Field(default=0, ge=0)
    """Which of several draws of training sets is used. Tasks made of the same rows need different draws, or they train
    on the same examples and add no evidence."""
    scorer: dict[str, Any] = {}
    """What scores generated answers. If empty, what `behaviour.toml` in the task's folder says, or a classifier."""
    instructions: list[str] = []
    """What prompting arms tell the model to do; each is one trial of their tuning. If empty, those in the file
    `instructions.toml` in the task's folder."""
    instructions_by: str = ""
    """Who wrote the instructions, and with which budget (how many were tried, on which rows)."""

    @property
    def called(self) -> str:
        """Its label, or one made from its name."""
        return self.label or Path(self.name).name + ("_reversed" if self.reverse else "")


def with_instructions(task: TaskTable, folder: Path) -> TaskTable:
    """A task with its instructions: its own, or from the file `instructions.toml` in its folder.

    Raises:
        ArmError: the file has other keys, or the task's own instructions have no author.
    """
    file = folder / "instructions.toml"
    given = task.instructions or task.instructions_by
    if not given and not task.reverse and not task.columns and file.is_file():
        tables = read_toml(file)
        check_keys(str(file), tables, ["by", "instructions"])
        instructions = {"instructions": tables.get("instructions", []), "instructions_by": tables.get("by", "")}
        task = task.model_copy(update=instructions)
    if task.instructions and not task.instructions_by.strip():
        raise ArmError(
            f"Task {task.called!r} has instructions without an author: say in instructions_by who wrote them, with "
            "which budget (how many were tried, on which rows)."
        )
    return task


class MatchedTable(BaseModel, extra="forbid", strict=True):
    """`[matched]`: the strengths at which arms are compared fairly, as their KL to the base on neutral text.

    An arm is measured at `kl`, and at every KL of `frontier`, from one training. A frontier is summed up by its mean
    over log KL: over KL itself, the part between .1 and .3, where damage is largest, would be three quarters of it.
    """

    kl: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    frontier: list[float] = [0.03, 0.1, 0.3]
    answers: list[float] = []
    """The KLs at which answers are generated, the most expensive part of a cell. If empty, all of them."""
    largest_strength: float = Field(default=64.0, gt=0, allow_inf_nan=False)

    @field_validator("frontier")
    @classmethod
    def _rising(cls, frontier: list[float]) -> list[float]:
        if not all(math.isfinite(kl) and kl > 0 for kl in frontier) or sorted(set(frontier)) != frontier:
            raise ValueError(
                f"must list KLs above 0 in rising order, each once (got {frontier}); [] measures arms at `kl` alone"
            )
        return frontier

    @model_validator(mode="after")
    def _answers_where_measured(self) -> Self:
        if self.answers and not {self.kl} <= {*self.answers} <= {*self.targets}:
            raise ValueError(f"answers={self.answers} must be some of the KLs {self.targets}, including {self.kl:g}")
        return self

    @property
    def targets(self) -> list[float]:
        """Every KL at which an arm is measured."""
        return sorted({self.kl, *self.frontier})

    @property
    def key(self) -> dict[str, Any]:
        """The part of a cell's key that comes from this table."""
        return self.model_dump(mode="json", exclude=None if self.answers else {"answers"})

    def targets_of(self, strength: str) -> list[float]:
        """The KLs that a claim at this strength is about."""
        return {"matched": [self.kl], "frontier": self.frontier}.get(strength, [])


@dataclass(frozen=True)
class GridArm:
    """An arm of a grid: its name, its level of every factor (None for an arm from a file), its tables and budget."""

    name: str
    levels: Combination | None
    arm: Arm
    budget: BudgetTable


class GridTables(BaseModel, extra="forbid", strict=True):
    """The tables of a grid's file."""

    name: str
    base: str = "vector_dpo"
    arms: list[str] = []
    tasks: list[str | TaskTable] = Field(min_length=1)
    examples: list[int] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    neutral: str | None = None
    """A file of neutral prompts and completions. If None, the embedded one."""
    model: dict[str, Any] = {}
    trainer: dict[str, Any] = {}
    """Training arguments of all arms that are trained."""
    loss: dict[str, Any] = {}
    """Options of the loss for all arms."""
    generations: int = Field(default=16, ge=0)
    new_tokens: int = Field(default=32, ge=1)
    questions: int = Field(default=100, ge=0, le=100)
    """How many sentences with a fixed ending a model has to complete, to measure what it still knows."""
    card: Card | None = None
    claim: Claim | None = None
    design: DesignTable = DesignTable(kind="arms")
    factors: dict[str, dict[str, Any]] = {}
    splits: SplitTable = SplitTable()
    budget: BudgetTable = BudgetTable()
    budgets: dict[str, dict[str, Any]] = {}
    matched: MatchedTable = MatchedTable()

    @field_validator("factors")
    @classmethod
    def _plain_names(cls, factors: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Names of factors and levels become folders, and are part of the statistics' formulas, which are
        evaluated."""
        for name in (name for factor, levels in factors.items() for name in (factor, *levels)):
            if not re.fullmatch(r"\w[\w.+-]*|-", name, re.ASCII):
                raise ValueError(f"{name!r} cannot name a factor or level: use letters (a-z), digits, '_', '-', '.'")
        return factors


def read_tables(grid: dict[str, Any]) -> GridTables:
    """The tables of a `grid.json`.

    Raises:
        ArmError: they are not the tables of a grid.
    """
    try:
        content = dict(grid["tables"])
        if "strength" not in content["claim"]:  # version 3 meant the tuned strength where it did not say "matched"
            content["claim"] = {"strength": "tuned", **content["claim"]}
        if "frontier" not in content["matched"]:  # version 4: one KL, and claims about its own tasks
            content["matched"] = {**content["matched"], "frontier": []}
            content["claim"] = {"tasks": "fixed", **content["claim"]}
        tables = GridTables(**content)
        arms, cells = [(arm["name"], arm["levels"]) for arm in grid["arms"]], grid["cells"]
        texts = [*(name for name, _ in arms), *cells, *grid["notes"], grid["command"]]
        if not all(isinstance(text, str) for text in texts) or tables.card is None or tables.claim is None:
            raise ValueError("names, cells, notes, command, [card] and [claim] are expected")
        if missing := {tables.claim.better, tables.claim.than} - {name for name, _ in arms}:
            raise ValueError(f"[claim] is about {sorted(missing)}, which are not arms of the grid")
        for point in (tables.design.start, tables.design.end) if tables.design.start and tables.design.end else ():
            if missing := [f for f, levels in tables.factors.items() if point.get(f) not in levels]:
                raise ValueError(f"design.start and design.end name no level of {missing}")
    except (KeyError, TypeError, ValueError) as error:
        raise ArmError(f"grid.json holds no grid: {type(error).__name__}: {error}") from error
    return tables
