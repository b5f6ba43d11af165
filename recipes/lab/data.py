"""Models, adapters and data by name: embedded, from the Hub, or a local path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from steertune.adapters import SteeringVectorConfig
from steertune.recipes.lab import embedded
from steertune.recipes.lab.files import ArmError, reasons
from steertune.recipes.lab.forms import has_template
from steertune.recipes.lab.similarity import By, overlap, text_of
from steertune.recipes.lab.sources import Parts, Reading, load_parts
from steertune.recipes.lab.tables import DataTable, ModelTable


def load_model(table: ModelTable) -> tuple[Any, Any]:
    """Model in evaluation mode, and its tokenizer. Weights are safetensors; code that comes with a model is not run.

    Raises:
        ArmError: there is no such model, or it needs custom code or pickled weights.
    """
    dtype = getattr(torch, table.dtype)
    if table.name == "embedded":
        return embedded.load_model(dtype), embedded.load_tokenizer()
    safe: Any = {"revision": table.revision, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(table.name, dtype=dtype, use_safetensors=True, **safe)
        tokenizer = AutoTokenizer.from_pretrained(table.name, **safe)
    except Exception as error:  # a missing or broken model can raise many kinds of errors
        raise not_loaded(table, error) from error
    if tokenizer.eos_token_id is None and (end := _end_of(model, tokenizer)) is not None:
        tokenizer.eos_token = end  # trainers end answers with it
    return model.eval(), tokenizer


def not_loaded(table: ModelTable, error: Exception) -> ArmError:
    """The error for a model that transformers cannot load, and why."""
    return ArmError(
        f"model.name={table.name!r} cannot be loaded: {type(error).__name__}: {error} (Use 'embedded', a folder or a "
        "Hub name with config.json, a tokenizer and safetensors weights.)"
    )


def _end_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The end-of-text token of the model's generation configuration; None if there is none."""
    ids = model.generation_config.eos_token_id if model.generation_config is not None else None
    first = ids[0] if isinstance(ids, list) and ids else ids
    token = tokenizer.convert_ids_to_tokens(first) if isinstance(first, int) and first < len(tokenizer) else None
    return token if isinstance(token, str) else None


def model_has_template(table: ModelTable) -> bool:
    """Whether the tokenizer of a model has a chat template; its weights are not loaded."""
    if table.name == "embedded":
        return True
    try:
        tokenizer = AutoTokenizer.from_pretrained(table.name, revision=table.revision, trust_remote_code=False)
    except Exception:  # `load_model` reports the error
        return True
    return has_template(tokenizer)


def adapter_config(folder: Path) -> SteeringVectorConfig:
    """The configuration of a steering vector's folder, its weights checked.

    Raises:
        ArmError: the folder holds no adapter, or an unusable steering vector.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ArmError(f"{folder} is not an adapter folder: it has no adapter_config.json.")
    try:
        return SteeringVectorConfig.from_pretrained(str(folder))
    except (ValueError, TypeError) as error:
        raise ArmError(str(error)) from error


def base_of(folder: Path, base: str | None = None, dtype: str = "float32") -> ModelTable:
    """The base model of a steering vector; it is not loaded.

    Raises:
        ArmError: no usable adapter, or no base model.
    """
    config = adapter_config(folder)
    called = base or config.base_model_name_or_path
    if not called:
        raise ArmError(f"{folder} does not name its base model: give one.")
    called = embedded.local_name(called)
    local = called == "embedded" or Path(called).is_dir()
    table: Any = {"name": called, "revision": None if base or local else config.revision, "dtype": dtype}
    try:
        return ModelTable(**table)
    except ValidationError as error:
        raise ArmError(f"{folder / 'adapter_config.json'}: {reasons(error)}") from error


def load_steered(
    folder: Path, base: str | None = None, dtype: str = "float32", name: str = "default"
) -> tuple[Any, Any, str]:
    """A steering vector on its base model, in evaluation mode, the tokenizer, and the base model's name. `base` is
    used instead of the base model that the adapter names, and `name` is the adapter's name in the model.

    Raises:
        ArmError: no usable adapter, no base model, or one that the adapter was not made for.
    """
    table = base_of(folder, base, dtype)
    model, tokenizer = load_model(table)
    try:
        return PeftModel.from_pretrained(model, str(folder), adapter_name=name).eval(), tokenizer, table.name
    except ValueError as error:
        raise ArmError(str(error)) from error


def shuffled_pairs(rows: Dataset) -> Dataset:
    """Every row with the rejected answer of the next one, so that the two answers no longer share a prompt.

    Raises:
        ArmError: there is only one row, or the answers contain the prompt.
    """
    if len(rows) < 2:
        raise ArmError(f"data.pairing='shuffled' needs at least 2 examples (got {len(rows)}).")
    if not {"prompt", "rejected"} <= set(rows.column_names):
        raise ArmError(f"data.pairing='shuffled' needs the columns prompt and rejected (got {rows.column_names}).")
    following = rows["rejected"][1:] + rows["rejected"][:1]
    return rows.map(lambda _, index: {"rejected": following[index]}, with_indices=True)


@dataclass(frozen=True)
class Data:
    """Training and test rows.

    Attributes:
        test: Rows to measure on; empty if a single file is too short to be divided.
        by: What tells the rows apart.
        note: How many rows each part has, and how the split was made.
    """

    train: Dataset
    test: Dataset
    by: By
    note: str

    def all_rows(self) -> Dataset:
        """Training and test rows."""
        return concatenate_datasets([self.train, self.test]) if len(self.test) else self.train


def load_data(table: DataTable, chat: Callable[[], bool] = lambda: True, answers: bool = True) -> Data:
    """Training examples (the first `train` rows after shuffling by `seed`, so that smaller sets are subsets of larger
    ones) and test examples (the first `test` rows, the same for every seed). One file is divided. `chat` says whether
    the model has a chat template. Without `answers`, a prompt is enough.

    Raises:
        ArmError: an unknown name, a missing split, too few rows, rows that are not examples, or test rows that are
            also training rows.
    """
    reading = Reading(table.columns, table.format, chat, answers=answers)
    parts = load_parts(table.name, table.train_split, table.test_split, reading)
    train, test, one_file = parts.train, parts.test, parts.division is not None
    if one_file:
        _check_one_file(table)
    examples = table.train * table.times
    for rows, count, split in ((train, examples, table.train_split), (test, table.test, table.test_split)):
        if len(rows) < count and not one_file:
            raise ArmError(f"data.{split}: {count} rows requested, {table.name!r} has {len(rows)}. Ask for fewer.")
    test = test.select(range(min(table.test, len(test))))
    note = parts.note
    if table.drop_near_duplicates and not one_file:
        near = {i for i, _ in overlap(train.to_list(), test.to_list(), parts.by, table.near_duplicates)}
        train = train.select([i for i in range(len(train)) if i not in near])
        note += f" {len(near)} training rows that resemble test rows are left out."
    used = train.shuffle(seed=table.seed).select(range(min(examples, len(train))))
    if not one_file and (pairs := overlap(used.to_list(), test.to_list(), parts.by, table.near_duplicates)):
        raise ArmError(_overlapping(table.name, parts, dict(used[pairs[0][0]]), dict(test[pairs[0][1]]), len(pairs)))
    if table.pairing == "shuffled":
        used = shuffled_pairs(used)
    return Data(used, test, parts.by, f"{note} Used here: {len(used)} for training, {len(test)} held out.")


def _check_one_file(table: DataTable) -> None:
    """Refuse options that have no effect if a single file is divided.

    Raises:
        ArmError: the message names the option.
    """
    unused = ["near_duplicates", "drop_near_duplicates"]
    if Path(table.name).is_file():
        unused += ["train_split", "test_split"]
    for key in unused:
        value = getattr(table, key)
        if value != DataTable.model_fields[key].default:
            raise ArmError(
                f"data.{key}={value!r} has no effect on {table.name!r}: a single file is divided by a hash of its "
                "rows, and near-duplicates share a part. Remove it, or give a folder with a file for each split."
            )


def load_splits(table: DataTable) -> tuple[Dataset, Dataset]:
    """The training and the test rows of `load_data`."""
    data = load_data(table)
    return data.train, data.test


def _overlapping(name: str, parts: Parts, train: Any, test: Any, count: int) -> str:
    """The error message for a test row that is also a training row."""
    train_place, test_place = (
        place(rows.to_list().index(row)) if row in rows.to_list() else f"{name!r}"
        for place, rows, row in ((parts.places[0], parts.train, train), (parts.places[1], parts.test, test))
    )
    return (
        f"{test_place}, a held-out row, asks the same or nearly the same as the training row {train_place} ({count} "
        f"such pairs): {text_of(test.get('prompt', test.get('chosen')))[:120]!r}. Remove one of them, set "
        "data.drop_near_duplicates to true, or raise data.near_duplicates if these are different questions."
    )
