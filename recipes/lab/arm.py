"""An arm: one TOML file with the model, data, adapter, loss and training arguments. Every key can be overridden on the
command line.

Keys and types are checked before anything is loaded; an unknown key is an error that names the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from peft import PeftConfig, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import (
    BaseModel,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation
from trl import DPOConfig, SFTConfig

import steertune.adapters  # noqa: F401  registers the method with PEFT
from steertune.losses import Loss, get_loss, names, options_of
from steertune.recipes.lab import zoo
from steertune.recipes.lab.arm_files import read_tables, renamed_tables
from steertune.recipes.lab.files import ArmError, check_name, nearest, reasons, shown, toml_value
from steertune.recipes.lab.ingredients import Ingredient, check_recipe, kinds
from steertune.recipes.lab.keys import REFUSED
from steertune.recipes.lab.secrets import check_settings
from steertune.recipes.lab.tables import ArmTables
from steertune.trainers.arguments import check_values

UPSTREAM = "upstream"  # the loss of TRL's own trainer
IngredientT = TypeVar("IngredientT", bound=Ingredient)


class Arm(ArmTables):
    """A whole arm.

    `adapter.type` is any PEFT method in lower case or `none` (full finetuning); `loss.name` is a file of `losses/` or
    `upstream`; `[trainer]` takes every field of TRL's `DPOConfig` (pairs) or `SFTConfig` (demonstrations). Every file
    of `recipes/lab/ingredients/` is one more table.
    """

    ingredients: dict[str, SerializeAsAny[Ingredient]] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, tables: Any) -> Any:
        """Turn tables that are named after an ingredient into ingredients."""
        named = {name: kind for name, kind in kinds().items() if name in tables}
        made = {name: kind.model_validate(tables[name]) for name, kind in named.items()}
        rest = {key: value for key, value in tables.items() if key not in named}
        return rest | {"ingredients": {**tables.get("ingredients", {}), **made}}

    @model_serializer(mode="wrap")
    def _spread(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write ingredients as top-level tables, as in the file."""
        tables = handler(self)
        return tables | {name: table for name, table in tables.pop("ingredients", {}).items() if table}

    def get(self, kind: type[IngredientT]) -> IngredientT:
        """The arm's ingredient of a kind; if it has none, the default one, which changes nothing."""
        of_kind = [ingredient for ingredient in self.ingredients.values() if isinstance(ingredient, kind)]
        return of_kind[0] if of_kind else kind()

    def ordered_ingredients(self) -> list[Ingredient]:
        """The ingredients in the order in which they are applied to training."""
        return [self.ingredients[name] for name in kinds() if name in self.ingredients]

    def peft_config(self, adapter: Mapping[str, Any] | None = None) -> PeftConfig | None:
        """The PEFT configuration of an adapter table, by default the arm's; None for full finetuning."""
        options = dict(self.adapter if adapter is None else adapter)
        kind = str(options.pop("type", "steering_vector"))
        if kind == "none":
            check_keys("adapter", options, [])
            return None
        methods = _peft_methods()
        if kind not in methods:
            raise ArmError(f"adapter.type={kind!r} is not a PEFT method.{nearest(kind, [*methods, 'none'])}")
        check_keys("adapter", options, _options(methods[kind]))
        if kind == "steering_vector" and isinstance(options.get("basis"), str | list):
            options["basis"] = zoo.basis(options["basis"])
        _typed("adapter", options, methods[kind])
        try:
            return get_peft_config({"peft_type": kind.upper(), "task_type": "CAUSAL_LM", **options})
        except (ValueError, TypeError) as error:
            raise ArmError(f"[adapter]: {error}") from error

    def loss_object(self) -> Loss | None:
        """The loss; None for TRL's own."""
        options = dict(self.loss)
        name = str(options.pop("name", "dpo"))
        if name == UPSTREAM:
            check_keys("loss", options, [])
            return None
        return get_loss(name, **options)

    def views_seen(self) -> tuple[str, ...]:
        """Names of the views that the loss needs."""
        loss = self.loss_object()
        return () if loss is None else loss.needs.views

    def check_trainer(self, *kinds: type) -> None:
        """Check keys, types and ranges of `[trainer]` against one or more argument classes; at least one of them must
        accept each key."""
        for key, value in self.trainer.items():
            if key in REFUSED and value and value != "no":
                raise ArmError(f"trainer.{key}={'...' if key == 'hub_token' else shown(value)}: {REFUSED[key]}")
        check_runs_no_code("trainer", self.trainer)
        check_keys("trainer", self.trainer, [option for kind in kinds for option in _options(kind)])
        _typed("trainer", self.trainer, *kinds)
        try:
            check_values(self.trainer, "trainer")
        except ValueError as error:
            raise ArmError(str(error)) from error

    def training_arguments(self, kind: type, folder: str, **defaults: Any) -> Any:
        """Check keys and types, and create `kind(output_dir=folder, **[trainer])`."""
        self.check_trainer(kind)
        return kind(output_dir=folder, **{**defaults, **self.trainer})


def load_arm(file: str | Path, overrides: Sequence[str] = (), recipe: str = "") -> Arm:
    """Read an arm and apply `--table.key value` (or `--table.key=value`) overrides, values written as in TOML. `file`
    is a path, or the name of a file in `recipes/configs/arms/`; `recipe` names the command, which may refuse an
    ingredient.

    Raises:
        ArmError: no such arm, broken TOML, an unknown key, a value of the wrong type, an ingredient that the recipe
            refuses, or a view that the loss does not use (not checked with overrides, since another loss can leave
            views unused).
    """
    tables = read_tables(file)
    changes = [*_pairs(overrides)]
    for key, value in changes:
        _leave_options(tables, key, value)
    for key, value in changes:
        _put(tables, key, value)
    arm = make_arm(tables)
    check_recipe(arm, recipe)
    needed, views = arm.views_seen(), arm.model_dump().get("views", {})
    if not overrides and (unused := [name for name in views if name not in needed]):
        raise ArmError(
            f"Arm {arm.name!r} has [views] {unused}, but its loss uses none of them (it uses {list(needed)}). Remove "
            "them."
        )
    return arm


def make_arm(tables: dict[str, Any]) -> Arm:
    """Build an arm from its tables, and check every key.

    Raises:
        ArmError: an unknown key, a value of the wrong type, tables that contradict each other.
    """
    tables = renamed_tables(tables)
    check_keys("arm", tables, [*(name for name in Arm.model_fields if name != "ingredients"), *kinds()])
    check_tables("arm", {name: table for name, table in tables.items() if name not in kinds()}, Arm)
    check_settings(tables)
    try:
        arm = Arm(**tables)
    except ValidationError as error:
        raise ArmError(reasons(error)) from error
    check_name("arm", arm.name)
    arm.check_trainer(DPOConfig, SFTConfig)
    arm.peft_config()
    arm = _with_views(arm)
    for ingredient in arm.ingredients.values():
        ingredient.check(arm)
    return arm


def _with_views(arm: Arm) -> Arm:
    """Add the neutral view if the loss needs it; all other views that it needs must be in the arm.

    Raises:
        ArmError: the loss cannot be made, or a view is missing.
    """
    try:
        views = arm.views_seen()
    except (ValueError, TypeError) as error:
        raise ArmError(f"[loss]: {error}") from error
    tables = arm.model_dump()
    missing = [view for view in views if view not in tables.get("views", {})]
    if missing == ["neutral"]:
        return Arm(**{**tables, "views": {**tables.get("views", {}), "neutral": {}}})
    missing = [view for view in missing if view != "neutral"]
    if missing:
        options = " ".join(f"--views.{view}.name instruction --views.{view}.text '...'" for view in missing)
        raise ArmError(
            f"loss.name={arm.loss.get('name')!r} uses the model's outputs for other prompts, and the arm does not "
            f"have the views {missing}. Add an instruction for each: {options}"
        )
    return arm


def _pairs(words: Sequence[str]) -> Iterable[tuple[str, Any]]:
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ArmError(f"{word!r}: overrides are written --table.key value.")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise ArmError(f"--{key} has no value.")
            value = words.pop(0)
        yield key, toml_value(value)


def _put(tables: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        tables = tables.setdefault(name, {})
        if not isinstance(tables, dict):
            raise ArmError(f"--{key}: {name!r} is {shown(tables)}, not a table, so it cannot hold {last!r}.")
    tables[last] = value


def _leave_options(tables: dict[str, Any], key: str, value: Any) -> None:
    """If `key` selects another loss or adapter, drop the options that it does not have."""
    table, _, chooser = key.partition(".")
    if (table, chooser) == ("loss", "name"):
        options = [] if value == UPSTREAM else options_of(value) if value in names() else None
    elif (table, chooser) == ("adapter", "type"):
        methods = _peft_methods()
        options = [] if value == "none" else _options(methods[value]) if value in methods else None
    else:
        return
    if options is not None:  # `make_arm` refuses an unknown name
        tables[table] = {name: option for name, option in tables.get(table, {}).items() if name in options}


def _peft_methods() -> dict[str, type[PeftConfig]]:
    return {str(name.value).lower(): config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def _options(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def check_tables(what: str, tables: dict[str, Any], model: type[BaseModel]) -> None:
    """Check the keys of a table and of nested tables against a pydantic model, suggesting the nearest valid key."""
    check_keys(what, tables, list(model.model_fields))
    for name, value in tables.items():
        annotation = model.model_fields[name].annotation
        if get_origin(annotation) is dict and isinstance(value, dict):  # tables of any name
            value = list(value.values())
        for kind in (annotation, *get_args(annotation)):  # also in `Card | None` and `list[str | TaskTable]`
            kinds = [k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel)]
            for entry in value if isinstance(value, list) else [value]:
                if kinds and isinstance(entry, dict):
                    check_tables(name, entry, kinds[0])


def check_keys(table: str, keys: Iterable[str], allowed: list[str]) -> None:
    """Raise an ArmError for a key that is not allowed, and suggest the nearest one that is."""
    for key in keys:
        if key not in allowed:
            raise ArmError(f"Unknown key {shown(key)} in [{table}].{nearest(key, allowed)}")


def _typed(table: str, options: dict[str, Any], *kinds: type) -> None:
    """Check values against the annotations of dataclasses, which do not check types themselves. No value is converted:
    "8" is not 8. They are validated as JSON, so a list is accepted for a tuple. A field of several classes
    (`loss_type`) can have any of their types.
    """
    for key, value in options.items():
        problems = [_problem(_hints(kind)[key], value) for kind in kinds if key in _hints(kind)]
        if problems and all(problems):
            raise ArmError(f"{table}.{key}={shown(value)}: {problems[0]}.")


def _problem(hint: Any, value: Any) -> str:
    """Why a value does not match a type; "" if it does, or if pydantic does not know the type."""
    try:
        _adapter(hint).validate_json(json.dumps(value, default=str), strict=True)
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation):
        return ""
    except ValidationError as error:
        return error.errors()[0]["msg"]
    except (ValueError, RecursionError):  # the number is too large, or the nesting too deep, for JSON
        return "It is too large"
    return ""


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


_adapter = cache(TypeAdapter)


def check_runs_no_code(table: str, options: Mapping[str, Any]) -> None:
    """Refuse `trust_remote_code` anywhere in a table.

    Raises:
        ArmError: it is true.
    """
    for key, value in options.items():
        if key == "trust_remote_code" and value:
            raise ArmError(f"{table}.{key}={shown(value)}: {REFUSED[key]}")
        if isinstance(value, Mapping):
            check_runs_no_code(f"{table}.{key}", value)
