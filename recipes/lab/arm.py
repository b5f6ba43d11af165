"""An arm: one TOML file that says what is trained, on what and how. Every key can be overridden on the command line.

Keys and types are checked before anything is loaded; an unknown key is an error that names the nearest valid one.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from peft import PeftConfig, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation
from torch import nn

import steertune.adapters  # noqa: F401  registers the method with PEFT
from steertune.losses import Loss, get_loss
from steertune.recipes.lab.files import ArmError, check_name, read_toml
from steertune.recipes.lab.paths import CONFIGS, TASKS
from steertune.recipes.lab.teachers import TeacherTable
from steertune.trainers.inductive_biases import get_bias
from steertune.trainers.views import View, get_view

if TYPE_CHECKING:
    from steertune.recipes.lab.augmentation import Augmenter

ARMS = CONFIGS / "arms"
NEUTRAL = TASKS / "neutral_train.jsonl"
UPSTREAM = "upstream"  # the loss of TRL's own trainer


class ModelTable(BaseModel, extra="forbid"):
    """`[model]`: `embedded`, a Hub name, or a local folder."""

    name: str = "embedded"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    revision: str | None = None
    threads: int | None = Field(default=None, ge=1)


class DataTable(BaseModel, extra="forbid"):
    """`[data]`: an embedded task, a Hub name, or a local file or folder (json, jsonl, csv, parquet)."""

    name: str
    train: int = Field(default=32, ge=1)
    test: int = Field(default=40, ge=1)
    train_split: str = "train"
    test_split: str = "test"
    seed: int = Field(default=0, ge=0, lt=2**32)
    pairing: Literal["own", "shuffled"] = "own"
    """`shuffled`: every training prompt gets the rejected answer of another prompt."""


class PromptTable(BaseModel, extra="forbid"):
    """`[prompt]`: what stands in front of every prompt, in a grid (`recipes/ablation/prompted.py`)."""

    demonstrations: int = Field(default=0, ge=0)
    contrast: bool = False
    instruction: bool = False

    def __bool__(self) -> bool:
        return self.demonstrations > 0 or self.instruction


class EvaluationTable(BaseModel, extra="forbid"):
    """`[evaluation]`: what the page at the end shows."""

    strengths: list[Annotated[float, Field(allow_inf_nan=False)]] = [-1.0, 0.0, 0.5, 1.0, 2.0]
    generations: int = Field(default=3, ge=0)
    new_tokens: int = Field(default=40, ge=1)
    batch_size: int = Field(default=8, ge=1)


class OutputTable(BaseModel, extra="forbid"):
    """`[output]`: where the run is kept."""

    folder: str | None = None


class CardTable(BaseModel, extra="forbid"):
    """`[card]`: what the adapter's model card says that no measurement can."""

    behaviour: str | None = None
    """What it makes the model do, and on what."""
    problem: str | None = None
    """The question it was made for, its baselines, and what would count against it."""
    safety: str | None = None
    """What to look at before others use it, beside what every card says."""


class Arm(BaseModel, extra="forbid"):
    """A whole arm.

    `adapter.type` is any PEFT method in lower case or `none` (full finetuning); `loss.name` is a file of `losses/` or
    `upstream`; `[views.NAME]` is a view that the loss asks for, its `name` a file of `trainers/views/`;
    `[teachers.NAME]` are models that are trained first, for views that a teacher sees;
    `[biases.NAME]` are options of an inductive bias, NAME a file of `trainers/inductive_biases/`; `[augmentation]`
    makes more examples of the few, its `name` a file of `recipes/lab/augmentation/`; `[trainer]` takes every field of TRL's
    `DPOConfig` (pairs) or `SFTConfig` (demonstrations).
    """

    name: str
    model: ModelTable = ModelTable()
    data: DataTable
    adapter: dict[str, Any] = {"type": "steering_vector"}
    loss: dict[str, Any] = {"name": "dpo"}
    views: dict[str, dict[str, Any]] = {}
    teachers: dict[str, TeacherTable] = {}
    augmentation: dict[str, Any] = {}
    biases: dict[str, dict[str, Any]] = {}
    prompt: PromptTable = PromptTable()
    trainer: dict[str, Any] = {}
    evaluation: EvaluationTable = EvaluationTable()
    output: OutputTable = OutputTable()
    card: CardTable = CardTable()

    def peft_config(self) -> PeftConfig | None:
        """The adapter's configuration; None for full finetuning."""
        options = dict(self.adapter)
        kind = str(options.pop("type", "steering_vector"))
        if kind == "none":
            known("adapter", options, [])
            return None
        kinds = {str(name.value).lower(): config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if kind not in kinds:
            raise ArmError(f"adapter.type={kind!r} is no PEFT method.{nearest(kind, [*kinds, 'none'])}")
        known("adapter", options, [f.name for f in dataclasses.fields(kinds[kind])])
        _typed("adapter", options, kinds[kind])
        try:
            return get_peft_config({"peft_type": kind.upper(), "task_type": "CAUSAL_LM", **options})
        except (ValueError, TypeError) as error:
            raise ArmError(f"[adapter]: {error}") from error

    def loss_object(self) -> Loss | None:
        """The loss; None for TRL's own."""
        options = dict(self.loss)
        name = str(options.pop("name", "dpo"))
        if name == UPSTREAM:
            known("loss", options, [])
            return None
        return get_loss(name, **options)

    def views_seen(self) -> tuple[str, ...]:
        """Names of the views that the loss asks for."""
        loss = self.loss_object()
        return () if loss is None else loss.needs.views

    def view_objects(self, teachers: Mapping[str, nn.Module] | None = None) -> dict[str, View]:
        """The views by the name that the loss asks for. Neutral text is the recipes' own, and not that which measures
        the KL afterwards.

        Args:
            teachers: The models of `[teachers]`; None: only check that there is one for every view that asks.

        Raises:
            ArmError: an unknown view, option or teacher.
        """
        found = {}
        for key, table in self.views.items():
            options = dict(table)
            name = str(options.pop("name", key))
            if name == "neutral":
                lines = NEUTRAL.read_text(encoding="utf-8").splitlines()
                options.setdefault("rows", [json.loads(line) for line in lines])
            if name == "teacher":
                asked = str(options.get("model", key))
                if asked not in self.teachers:
                    raise ArmError(f"views.{key}.model={asked!r} is none of [teachers]: {sorted(self.teachers)}.")
                options["model"] = nn.Identity() if teachers is None else teachers[asked]
            try:
                found[key] = get_view(name, **options)
            except (ValueError, TypeError) as error:
                raise ArmError(f"[views.{key}]: {error}") from error
        return found

    def augmenter(self) -> tuple[Augmenter, int] | None:
        """What makes more examples, and how many times as many; None where nothing does."""
        from steertune.recipes.lab.augmentation import read

        return read(self.augmentation)

    def check_trainer(self, kind: type) -> None:
        """Check keys and types of `[trainer]` against a class of training arguments."""
        if (folder := self.trainer.get("output_dir")) is not None:
            raise ArmError(f"trainer.output_dir={folder!r}: the recipe chooses it. Set output.folder.")
        if self.trainer.get("trust_remote_code"):
            raise ArmError("trainer.trust_remote_code=true: code from a Hub repository is never run. Remove it.")
        known("trainer", self.trainer, [f.name for f in dataclasses.fields(kind)])
        _typed("trainer", self.trainer, kind)

    def training_arguments(self, kind: type, folder: str, **defaults: Any) -> Any:
        """`kind(output_dir=folder, **[trainer])`, its keys and types checked."""
        self.check_trainer(kind)
        return kind(output_dir=folder, **{**defaults, **self.trainer})


def parse_arm(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, default: str
) -> tuple[argparse.Namespace, list[str]]:
    """Parse `[ARM] [--table.key value ...]`: `options.arm`, and what `load_arm` takes as overrides. The arm stands
    first, so that the value of an override is not taken for it."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser.add_argument(
        "arm", nargs="?", help=f"a .toml file or a name in recipes/configs/arms/, before all else ({default})"
    )
    if not words or (words[0].startswith("-") and not {"-h", "--help"} & {*words}):
        words = [default, *words]
    return parser.parse_known_args(words)


def load_arm(file: str | Path, overrides: Sequence[str] = ()) -> Arm:
    """Read an arm and apply `--table.key value` (or `--table.key=value`) overrides, values written as in TOML.

    `file` is a path, or the name of a file in `recipes/configs/arms/`.

    Raises:
        ArmError: no such arm, broken TOML, an unknown key, a value of the wrong type, a view that the file's own loss
            does not ask for (that of an override may leave some).
    """
    tables = read_tables(file)
    for key, value in _pairs(overrides):
        _put(tables, key, value)
    arm = make_arm(tables)
    seen = arm.views_seen()
    if not overrides and (unseen := [name for name in arm.views if name not in seen]):
        raise ArmError(f"[views] {unseen} of arm {arm.name!r} are seen by nobody: its loss asks for {list(seen)}.")
    return arm


def read_tables(file: str | Path) -> dict[str, Any]:
    """The tables of an arm as they stand in its file, named after the file.

    Raises:
        ArmError: no such arm, or broken TOML.
    """
    path = Path(file) if Path(file).suffix == ".toml" else ARMS / f"{file}.toml"
    if not path.is_file():
        known = sorted(p.stem for p in ARMS.glob("*.toml"))
        raise ArmError(f"No arm {str(file)!r}: neither a .toml file nor one of {known}.{nearest(str(file), known)}")
    tables = read_toml(path)
    tables.setdefault("name", path.stem)
    return tables


def make_arm(tables: dict[str, Any]) -> Arm:
    """An arm from its tables, every key checked.

    Raises:
        ArmError: an unknown key, a value of the wrong type, tables that contradict each other.
    """
    known_tables("arm", tables, Arm)
    try:
        arm = Arm(**tables)
    except ValidationError as error:
        raise ArmError(reasons(error)) from error
    check_name("arm", arm.name)
    arm.peft_config()
    arm.view_objects()
    _check_prompt(arm)
    _check_augmentation(arm)
    _check_teachers(arm)
    for name, options in arm.biases.items():
        try:
            get_bias(name, **options)
        except (ValueError, TypeError) as error:
            raise ArmError(f"[biases.{name}]: {error}") from error
    try:
        arm.loss_object()
    except (ValueError, TypeError) as error:
        raise ArmError(f"[loss]: {error}") from error
    return arm


def _check_prompt(arm: Arm) -> None:
    if arm.prompt.contrast and not arm.prompt.demonstrations:
        raise ArmError("prompt.contrast shows demonstrations with their rejected answers: give prompt.demonstrations.")
    if arm.prompt and (arm.adapter.get("type") != "none" or arm.trainer.get("max_steps") != 0):
        raise ArmError('An arm with a [prompt] trains nothing: adapter.type = "none" and trainer.max_steps = 0.')
    if arm.prompt and arm.augmentation:
        raise ArmError("An arm with a [prompt] trains nothing, so [augmentation] would make examples for nothing.")


def _check_augmentation(arm: Arm) -> None:
    asked, steps = arm.augmenter(), arm.trainer.get("max_steps", -1)
    if asked is not None and asked[1] > 1 and not (isinstance(steps, int) and steps >= 0):
        raise ArmError(
            f"[augmentation] makes {asked[1]} times as many examples, and trainer.max_steps={steps!r}, so that all "
            "of them would be read as often: set trainer.max_steps, and the optimiser's budget stays what it was."
        )


def refuse_augmentation(arm: Arm, recipe: str) -> None:
    """Refuse an arm's `[augmentation]` where no examples are made.

    Raises:
        ArmError: it has one.
    """
    if arm.augmentation:
        raise ArmError(
            f"Arm {arm.name!r} has a [augmentation], and {recipe} makes no further examples: remove the table, or "
            "use the arm in train, in a grid or in a sweep."
        )


def _check_teachers(arm: Arm) -> None:
    seen = {table.get("model", view) for view, table in arm.views.items() if table.get("name", view) == "teacher"}
    for name, table in arm.teachers.items():
        if name not in seen:
            raise ArmError(f'[teachers.{name}] is asked by no view: [views.good] name = "teacher", model = "{name}".')
        make_arm({"name": name, "data": {"name": arm.data.name}, "adapter": table.adapter, "trainer": table.trainer})
        if table.adapter.get("type") != arm.adapter.get("type") and "learning_rate" not in table.trainer:
            raise ArmError(
                f"[teachers.{name}] trains {table.adapter.get('type')!r} at the learning rate that the arm has for "
                f"{arm.adapter.get('type')!r}: set teachers.{name}.trainer.learning_rate."
            )


def reasons(error: ValidationError) -> str:
    """What pydantic found, on one line."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


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
        try:
            yield key, tomllib.loads(f"value = {value}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            yield key, value  # a bare word is a string


def _put(tables: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        tables = tables.setdefault(name, {})
        if not isinstance(tables, dict):
            raise ArmError(f"--{key}: {name!r} is {tables!r}, not a table that could hold {last!r}.")
    tables[last] = value


def known_tables(what: str, tables: dict[str, Any], model: type[BaseModel]) -> None:
    """Check the keys of a table, and of the tables in it, against a pydantic model; the nearest valid key is named."""
    known(what, tables, list(model.model_fields))
    for name, value in tables.items():
        annotation = model.model_fields[name].annotation
        if get_origin(annotation) is dict and isinstance(value, dict):  # tables of any name
            value = list(value.values())
        for kind in (annotation, *get_args(annotation)):  # also in `Card | None` and `list[str | TaskTable]`
            kinds = [k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel)]
            for entry in value if isinstance(value, list) else [value]:
                if kinds and isinstance(entry, dict):
                    known_tables(name, entry, kinds[0])


def known(table: str, keys: Iterable[str], allowed: list[str]) -> None:
    """Raise an ArmError for a key that is not allowed, naming the nearest that is."""
    for key in keys:
        if key not in allowed:
            raise ArmError(f"Unknown key {key!r} in [{table}].{nearest(key, allowed)}")


def nearest(value: str, allowed: list[str]) -> str:
    """ " Did you mean ...?", or nothing."""
    near = difflib.get_close_matches(value, allowed, n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""


def _typed(table: str, options: dict[str, Any], kind: type) -> None:
    """Check values against the annotations of a dataclass, which itself keeps a string where a number belongs."""
    hints = get_type_hints(kind)
    for key, value in options.items():
        try:
            TypeAdapter(hints[key]).validate_python(value)
        except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation):
            continue  # an annotation that pydantic does not know
        except ValidationError as error:
            raise ArmError(f"{table}.{key}={value!r}: {error.errors()[0]['msg']}.") from error
