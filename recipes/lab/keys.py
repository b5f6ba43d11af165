"""Every `--table.key` of an arm, for help, completion and hints. Slow imports are avoided."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from steertune.recipes.lab.arm_files import RENAMED_TABLES
from steertune.recipes.lab.fields import FieldText, arguments_of, classes_in, fields_in, fields_of, is_dataclass
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.paths import modules_in
from steertune.recipes.lab.tables import ArmTables

INGREDIENTS = "recipes/lab/ingredients"
REFUSED = {
    "output_dir": "the recipe chooses it. Set output.folder.",
    "model_init_kwargs": "the recipe loads the model. Set [model].",
    "resume_from_checkpoint": "a run continues from the last checkpoint in its output folder. Set output.folder.",
    "hub_token": "it would be written into files. Set the environment variable HF_TOKEN.",
    "push_to_hub": "recipes write to the output folder only. Upload the adapter: hf upload NAME FOLDER/adapter.",
    "hub_model_id": "recipes upload nothing. Upload the adapter: hf upload NAME FOLDER/adapter.",
    "eval_strategy": "recipes measure before and after the training. Remove it.",
    "trust_remote_code": "code from a Hub repository is never run. Remove it.",
}
"""Fields of `[trainer]` that an arm cannot set, and what to do instead."""
USUAL = {
    "lr": "trainer.learning_rate",
    "learning-rate": "trainer.learning_rate",
    "epochs": "trainer.num_train_epochs",
    "num-epochs": "trainer.num_train_epochs",
    "batch-size": "trainer.per_device_train_batch_size",
    "batch": "trainer.per_device_train_batch_size",
    "gradient-accumulation": "trainer.gradient_accumulation_steps",
    "steps": "trainer.max_steps",
    "max-steps": "trainer.max_steps",
    "warmup": "trainer.warmup_steps",
    "optimizer": "trainer.optim",
    "weight-decay": "trainer.weight_decay",
    "beta": "loss.beta",
    "loss": "loss.name",
    "output": "output.folder",
    "output-dir": "output.folder",
    "out": "output.folder",
    "folder": "output.folder",
    "model": "model.name",
    "model-name": "model.name",
    "dtype": "model.dtype",
    "data": "data.name",
    "dataset": "data.name",
    "dataset-name": "data.name",
    "task": "data.name",
    "train": "data.train",
    "test": "data.test",
    "seed": "data.seed",
    "layer": "adapter.layers",
    "layers": "adapter.layers",
    "adapter": "adapter.type",
    "rank": "adapter.rank",
    "norm": "adapter.norm",
    "init": "adapter.init",
    "strength": "evaluation.strengths",
    "strengths": "evaluation.strengths",
    "generations": "evaluation.generations",
    "new-tokens": "evaluation.new_tokens",
}
"""Common names of other tools, and the keys that they stand for."""


@dataclass(frozen=True)
class Key:
    """One key of an arm.

    Attributes:
        group: The heading that it is listed under.
        name: `table.key`.
        type: The type of its value.
        default: Its default in the syntax of TOML or Python; empty without a default.
        text: Its description.
    """

    group: str
    name: str
    type: str
    default: str
    text: str


def table_names() -> dict[str, None]:
    """The tables of an arm, including their former names."""
    return dict.fromkeys([*ArmTables.model_fields, *modules_in(INGREDIENTS), *RENAMED_TABLES])


@cache
def arm_keys() -> dict[str, Key]:
    """Every key by its name, in the order of the tables."""
    keys = [*_of_tables(), *_of_loss(), *_of_adapter(), *_of_trainer(), *_of_ingredients()]
    tables = [*table_names()]
    keys.sort(key=lambda key: tables.index(key.name.partition(".")[0]))
    return {key.name: key for key in keys}


def meant(name: str) -> str | None:
    """The key that a wrong name without its dashes most likely stands for; None if no key is similar."""
    plain = name.replace("_", "-")
    if plain in USUAL:
        return USUAL[plain]
    keys = arm_keys()
    table, dot, _ = name.partition(".")
    # users of TRL type the field itself: --learning_rate
    bare = [full for full in keys if full.partition(".")[2] == name.replace("-", "_")]
    if not dot and bare:
        return bare[0]
    of_table = [full for full in keys if dot and full.startswith(f"{table}.")]
    near = difflib.get_close_matches(name, of_table or [*keys], n=1, cutoff=0.6)
    return near[0] if near else None


def _of_tables() -> Iterator[Key]:
    """Keys of the tables that every arm has."""
    for table, field in ArmTables.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for key, entry in kind.model_fields.items():
                annotation: Any = entry.annotation
                is_class = isinstance(annotation, type) and get_origin(annotation) is None
                written, default = annotation.__name__ if is_class else str(annotation), entry.default
                shown = "" if default in (None, PydanticUndefined, {}) else _in_toml(default)
                yield Key(table, f"{table}.{key}", _plain(written), shown, entry.description or "")
        elif table == "name":
            yield Key("name", table, "str", "", field.description or "")


def _of_ingredients() -> Iterator[Key]:
    """Keys of the ingredients, and one line for each ingredient whose keys depend on what it names."""
    for table in modules_in(INGREDIENTS):
        module = f"steertune.{INGREDIENTS.replace('/', '.')}.{table}"
        for node in classes_in(module):
            bases = {ast.unparse(base) for base in node.bases}
            text = (ast.get_docstring(node) or "").split("\n")[0]
            if "Named" in bases:
                yield Key(table, f"{table}.NAME.KEY", "any", "", text)
            elif "Ingredient" in bases and node.keywords:  # extra="allow"
                yield Key(table, f"{table}.KEY", "any", "", text)
            elif "Ingredient" in bases:
                for field in fields_in(module, node):
                    yield _key(table, table, field)


def _of_loss() -> Iterator[Key]:
    """`loss.name`, and the options of every loss; an option that several losses have gets one line."""
    names = modules_in("losses")
    yield Key("loss", "loss.name", " | ".join([*names, "upstream"]), "dpo", "What is minimised.")
    for field in arguments_of("steertune.losses", "get_loss"):
        yield _key("loss", "loss", field)
    options: dict[str, dict[str, FieldText]] = {}
    for loss in names:
        module = f"steertune.losses.{loss}"
        for kind in filter(is_dataclass, classes_in(module)):
            for field in fields_of(module, kind.name).values():
                options.setdefault(field.name, {})[loss] = field
    for fields in options.values():
        defaults: dict[str, list[str]] = {}
        for loss, field in fields.items():
            defaults.setdefault(field.default or "", []).append(loss)
        default = _unquoted(next(iter(defaults)))
        if len(defaults) > 1:
            default = "; ".join(f"{_unquoted(value)} ({', '.join(losses)})" for value, losses in defaults.items())
        first = next(iter(fields.values()))
        yield replace(_key("loss", "loss", first, f"Of {', '.join(fields)}. "), default=default)


def _of_adapter() -> Iterator[Key]:
    """The fields of a steering vector, and those that only LoRA has."""
    ours = fields_of("steertune.adapters.config", "SteeringVectorConfig")
    yield Key("adapter", "adapter.type", "str", "steering_vector", ArmTables.model_fields["adapter"].description or "")
    for field in ours.values():
        yield _key("adapter", "adapter", field)
    for name, field in fields_of("peft", "LoraConfig").items():
        if name not in ours:
            yield _key("adapter, of type lora", "adapter", field)


def _of_trainer() -> Iterator[Key]:
    """The fields of TRL's arguments, with a note on those that only one of its trainers has."""
    pairs, demonstrations = fields_of("trl", "DPOConfig"), fields_of("trl", "SFTConfig")
    for name, field in (pairs | demonstrations).items():
        if name not in REFUSED:
            only = "" if name in pairs and name in demonstrations else "Pairs only. "
            only = "Demonstrations only. " if name not in pairs else only
            yield _key("trainer", "trainer", field, only)


def _key(group: str, table: str, field: FieldText, note: str = "") -> Key:
    default = "" if field.default in (None, "None") else _unquoted(field.default)
    return Key(group, f"{table}.{field.name}", _plain(field.type), default, note + field.text)


def _plain(kind: str) -> str:
    """A type as shown in the help: `a | b` for a choice, without None and without module names."""
    kind = re.sub(r"\b(?:typing|collections\.abc|annotationlib)\.", "", kind)
    kind = re.sub(r"Annotated\[(\w+), .*\)\]\)?\]", r"\1]", kind)
    kind = re.sub(r"Optional\[(.*)\]$", r"\1", kind)
    # a union's parts are separated by the commas outside brackets
    kind = re.sub(r"Union\[(.*)\]$", lambda match: " | ".join(re.split(r", (?![^\[]*\])", match[1])), kind)
    kind = re.sub(
        r"Literal\[((?:'[^']*'|[^]'])*)\]", lambda match: match[1].replace("'", "").replace(", ", " | "), kind
    )
    return kind.removesuffix(" | None")


def _in_toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _unquoted(default: str) -> str:
    try:
        return _in_toml(ast.literal_eval(default))
    except ValueError:
        return default


def split_overrides(words: Sequence[str], own: Container[str]) -> tuple[list[str], list[str]]:
    """Take `--table.key value`, `--table.key=value` and `--table={...}` out of the words of a command line. The
    command's `own` options, such as `--train`, take precedence over a table of the same name.

    Returns:
        The other words, and what `load_arm` takes as overrides.

    Raises:
        ArmError: a table has no such key.
    """
    rest, overrides, left = [], [], list(words)
    while left:
        word = left.pop(0)
        key, equals, value = word[2:].partition("=")
        table, dot, _ = key.partition(".")
        if not word.startswith("--") or table not in table_names() or f"--{key}" in own:
            rest.append(word)
            continue
        whole = (value if equals else "".join(left[:1])).lstrip().startswith("{")
        if not (dot or whole or table == "name"):
            rest.append(word)
            continue
        if dot:
            _check(key)
        overrides += [word] if equals or not left else [word, left.pop(0)]
    return rest, overrides


def _check(name: str) -> None:
    """Refuse a key that its table cannot have; an adapter's keys depend on its type and are checked later."""
    table, _, key = name.partition(".")
    closed = {full.partition(".")[0] for full in arm_keys() if not full.endswith("KEY")} - {"adapter"}
    if table not in closed or name in arm_keys() or key in REFUSED:
        return
    near = meant(name)
    raise ArmError(f"Unknown key {key!r} in [{table}]." + (f" Did you mean --{near}?" if near else ""))
