"""The command line of a sweep, checked before any work."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, get_args

from pydantic import ValidationError
from trl import DPOConfig

from steertune.adapters import directions
from steertune.adapters.blocks import find_blocks, resolve_layers
from steertune.adapters.types import Site
from steertune.recipes.lab import scorers
from steertune.recipes.lab.behaviours import read_behaviour
from steertune.recipes.lab.checks import check_adapters, check_training, check_trains, skeleton
from steertune.recipes.lab.files import ArmError, reasons
from steertune.recipes.lab.options import columns_of
from steertune.recipes.lab.paths import without_paths
from steertune.recipes.lab.splits import SplitTable
from steertune.recipes.lab.tables import ModelTable
from steertune.recipes.sweeping.settings import Limits, SweepTable, at, read_arm


def request(options: SimpleNamespace, overrides: list[str]) -> SweepTable:
    """The request, checked against the model's configuration without loading the model.

    Raises:
        ArmError: a value is not valid.
    """
    arm = None if options.arm is None else read_arm(options.arm, overrides)
    if arm is None and overrides:
        raise ArmError(f"Unknown arguments {overrides}: --table.key value is only allowed with --arm.")
    direction = None if arm is not None else options.direction or "mean_difference"
    if direction is not None:
        directions.get(direction)
    base = ModelTable() if arm is None else arm.model
    base = base if options.model is None else ModelTable(name=options.model)
    if not options.strengths or not options.layers:
        raise ArmError("--layers and --strengths must have one or more values each.")
    for site in options.sites:
        if arm is not None and site in get_args(Site):
            at(arm, site, 0)
    scorer = None if options.scorer is None else _scorer(options.scorer, options.task)
    layers = _layers(options.layers)
    try:
        layers = resolve_layers(layers, len(find_blocks(skeleton(base))))
        table = SweepTable(
            task=options.task,
            columns=columns_of(options.columns) or ({} if arm is None else arm.data.columns),
            format="auto" if arm is None else arm.data.format,
            model=base,
            direction=direction,
            arm=arm,
            layers=layers,
            sites=list(dict.fromkeys(options.sites)),
            strengths=options.strengths,
            train=options.train if options.train is not None else 32 if arm is None else arm.data.train,
            splits=SplitTable(
                validation=options.validation, test=options.test, scorer=options.scorer_rows if scorer else 0
            ),
            seed=options.seed,
            scorer=scorer,
            generations=options.generations,
            new_tokens=options.new_tokens,
            limits=Limits(**{name: getattr(options, f"max_{name}") for name in Limits.model_fields}),
        )
    except ValidationError as error:
        raise ArmError(reasons(error)) from error
    if scorer and not table.generations:
        raise ArmError("--scorer scores generated answers, so --generations must be 1 or more.")
    if arm is not None:
        check_training(arm, DPOConfig)
        check_trains(arm)
        check_adapters([at(arm, site, layer) for site in table.sites for layer in layers])
    return table


def _layers(words: Sequence[Any]) -> Any:
    if [str(word) for word in words] == ["all"]:
        return "all"
    layers = []
    for word in words:
        try:
            value = float(word) if "." in str(word) else int(word)
        except ValueError:
            raise ArmError(
                f"--layers {word!r} must be an index, a fraction of the depth below 1, or 'all' alone."
            ) from None
        if value < 0 or (isinstance(value, float) and value >= 1):
            raise ArmError(f"--layers {word}: indices count from 0, fractions of the depth are in [0, 1).")
        layers.append(value)
    return layers


def _scorer(text: str, task: str) -> dict[str, Any]:
    """The scorer's table, completed with the task's defaults, and checked."""
    try:
        table = tomllib.loads(f"value = {text}")["value"] if text.lstrip().startswith("{") else {"kind": text}
    except tomllib.TOMLDecodeError as error:
        raise ArmError(f"--scorer {text} is not a TOML table: {error}") from error
    table = read_behaviour(task).scorer_table(table)
    scorers.read(table)
    return table


def as_typed(words: Sequence[str], module: str = "sweep") -> str:
    """The command line, without the paths of this machine."""
    return shlex.join(["python", "-m", f"steertune.recipes.{module}", *without_paths(words)])
