"""Levels of factors: small patches of the base arm.

    [factors.form]
    bias = { adapter.form = "bias" }
    lora = { adapter = { type = "lora", r = 8, target_modules = "all-linear" }, trainer.learning_rate = 5e-4 }

    [factors.init]
    zeros = {}
    mean_difference = [{ when = { form = "lora" }, inert = true }, { adapter.init = "mean_difference" }]

In a list, the first entry whose `when` matches is used. `inert` says that the level means nothing there;
combinations that differ only in inert levels are one arm. A patch is merged into the base arm like an arm into the
one it extends (`lab/arm_files.py`): if it names another adapter, loss, augmentation or view, it replaces the whole
table.
"""

from __future__ import annotations

import copy
from typing import Any

from steertune.recipes.ablation.designs import Combination
from steertune.recipes.ablation.tables import GridTables
from steertune.recipes.lab.arm import Arm, check_keys, make_arm
from steertune.recipes.lab.arm_files import merge_tables, read_tables, renamed_tables
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.ingredients import kinds

INERT = "-"
_CORE = ["adapter", "loss", "trainer", "data"]


def with_common(raw: dict[str, Any], tables: GridTables) -> dict[str, Any]:
    """An arm with the grid's settings for all arms; an untrained arm stays untrained."""
    common: dict[str, Any] = {"model": tables.model, "loss": tables.loss}
    trainer = raw.get("trainer", {})
    if isinstance(trainer, dict) and trainer.get("max_steps") != 0:
        common["trainer"] = tables.trainer
    return merge_tables(raw, {name: table for name, table in common.items() if table})


def arm_of(raw: dict[str, Any], tables: GridTables) -> Arm:
    """The arm of these tables. Without a number of steps it gets one from the budget, which every trial sets anyway.

    Raises:
        ArmError: see `make_arm`.
    """
    trainer = raw.get("trainer", {})
    if isinstance(trainer, dict):
        raw = {**raw, "trainer": {"max_steps": tables.budget.steps[0], **trainer}}
    return make_arm(raw)


def patched(tables: GridTables, combination: Combination) -> tuple[Combination, Arm]:
    """The base arm with a combination's patches, and the combination with `-` for inert levels.

    Raises:
        ArmError: a patch does not fit.
    """
    raw = with_common(read_tables(tables.base), tables)
    levels, entries = _levels(tables, combination)
    for entry in entries:
        raw = merge_tables(raw, entry)
    try:
        return levels, arm_of(raw, tables)
    except ArmError as error:
        raise ArmError(f"Combination {combination}: {error}") from error


def arm_name(tables: GridTables, combination: Combination) -> str:
    """Name of a combination's arm. The arm itself is not made: a report can be about somebody else's grid, whose arms
    may name files and functions."""
    return named(_levels(tables, combination)[0])


def _levels(tables: GridTables, combination: Combination) -> tuple[Combination, list[dict[str, Any]]]:
    """A combination with `-` for inert levels, and the patches of the others."""
    levels: Combination = {}
    entries = []
    for factor, level in combination.items():
        entry = _entry(factor, level, tables.factors[factor][level], combination, tables)
        inert = entry.pop("inert", False)
        levels[factor] = INERT if inert else level
        if not inert:
            entries.append(entry)
    return levels, entries


def named(levels: Combination) -> str:
    """Name of the arm with these levels."""
    return ",".join(f"{factor}={level}" for factor, level in levels.items())


def _entry(factor: str, level: str, patch: Any, combination: Combination, tables: GridTables) -> dict[str, Any]:
    """The patch of a level that applies to a combination."""
    for option in patch if isinstance(patch, list) else [patch]:
        if not isinstance(option, dict):
            raise ArmError(f"factors.{factor}.{level}={patch!r} must be a table or a list of tables.")
        option = renamed_tables(copy.deepcopy(option))
        when = option.pop("when", {})
        where = f"factors.{factor}.{level}"
        if not isinstance(when, dict):
            raise ArmError(f'{where}: when={when!r} must be a table, such as {{ form = "lora" }}.')
        check_keys(where, option, ["inert", *_CORE, *kinds()])
        if not isinstance(option.get("data", {}), dict):
            raise ArmError(f'{where}: data={option["data"]!r} must be a table, such as {{ pairing = "shuffled" }}.')
        # the rest comes from the grid itself
        check_keys(f"{where}.data", option.get("data", {}), ["pairing", "times"])
        for other, values in when.items():
            if not isinstance(values, str | list):
                raise ArmError(f"{where}: when.{other}={values!r} must be a level or a list of levels.")
            if other not in tables.factors:
                raise ArmError(f"{where}: when names {other!r}, but the factors are {[*tables.factors]}.")
            missing = set([values] if isinstance(values, str) else values) - set(tables.factors[other])
            if missing:
                raise ArmError(f"{where}: {sorted(missing)} are not levels of {other!r}.")
        if all(combination[other] in ([w] if isinstance(w, str) else w) for other, w in when.items()):
            return option
    raise ArmError(f"factors.{factor}.{level}: no entry matches {combination}. Add a final entry without `when`.")
