"""Models, adapters and data by name: embedded, from the Hub, or a local path."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, get_dataset_split_names, load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from steertune.adapters import SteeringVectorConfig
from steertune.recipes.lab import embedded
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.tables import DataTable, ModelTable

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_model(table: ModelTable) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in evaluation mode, and tokenizer. Weights are safetensors; code that comes with a model is not run.

    Raises:
        ArmError: no such model, or one that needs code of its own or a pickle.
    """
    dtype = getattr(torch, table.dtype)
    if table.name == "embedded":
        return embedded.load_model(dtype), embedded.load_tokenizer()
    safe: Any = {"revision": table.revision, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(table.name, dtype=dtype, use_safetensors=True, **safe)
        tokenizer = AutoTokenizer.from_pretrained(table.name, **safe)
    except Exception as error:  # of the many kinds that a folder without a model, or a broken one, leads to
        raise ArmError(
            f"model.name={table.name!r} cannot be loaded: {type(error).__name__}: {error} (Expected are 'embedded', a "
            "folder or a Hub name with config.json, a tokenizer and safetensors weights.)"
        ) from error
    return model.eval(), tokenizer


def adapter_config(folder: Path) -> SteeringVectorConfig:
    """The configuration of a steering vector's folder, its weights checked.

    Raises:
        ArmError: there is no adapter in the folder, or not a usable steering vector.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ArmError(f"{folder} is no adapter folder: it has no adapter_config.json.")
    try:
        return SteeringVectorConfig.from_pretrained(str(folder))
    except (ValueError, TypeError) as error:
        raise ArmError(str(error)) from error


def load_steered(
    folder: Path, base: str | None = None, dtype: str = "float32", name: str = "default"
) -> tuple[PeftModel, PreTrainedTokenizerBase, str]:
    """A steering vector on its base model, in evaluation mode, the tokenizer, and the base model's name.

    Args:
        folder: The adapter's.
        base: As in `ModelTable`; None: what the adapter names.
        dtype: Of the base model.
        name: Of the adapter in the model.

    Raises:
        ArmError: no usable adapter, no base model, or not the one that the adapter was made for.
    """
    config = adapter_config(folder)
    called = base or config.base_model_name_or_path
    if not called:
        raise ArmError(f"{folder} does not name its base model: give one.")
    if called == embedded.MODEL_NAME and embedded.installed():
        called = "embedded"
    table: Any = {"name": called, "revision": None if base else config.revision, "dtype": dtype}
    model, tokenizer = load_model(ModelTable(**table))
    try:
        return PeftModel.from_pretrained(model, str(folder), adapter_name=name).eval(), tokenizer, called
    except ValueError as error:
        raise ArmError(str(error)) from error


def load_splits(table: DataTable) -> tuple[Dataset, Dataset]:
    """Training examples (the first `train` rows after shuffling by `seed`, so that smaller sets are subsets of larger
    ones) and test examples (the first `test` rows, the same for every seed).

    Raises:
        ArmError: an unknown name, a missing split, too few rows.
    """
    train, test = (load_split(table.name, split) for split in (table.train_split, table.test_split))
    count = table.train * table.times
    for rows, asked, split in ((train, count, table.train_split), (test, table.test, table.test_split)):
        if len(rows) < asked:
            raise ArmError(f"data.{split}: {asked} rows asked, {table.name!r} has {len(rows)}. Ask for fewer.")
    train = train.shuffle(seed=table.seed).select(range(count))
    return (shuffled_pairs(train) if table.pairing == "shuffled" else train), test.select(range(table.test))


def shuffled_pairs(rows: Dataset) -> Dataset:
    """Every row with the rejected answer of the next one, so that the two answers no longer share a prompt.

    Raises:
        ArmError: a single row, or rows whose answers hold their prompt.
    """
    if len(rows) < 2:
        raise ArmError(f"data.pairing='shuffled' needs at least 2 examples, there are {len(rows)}.")
    if not {"prompt", "rejected"} <= set(rows.column_names):
        raise ArmError(
            f"data.pairing='shuffled' needs columns prompt and rejected; the data have {rows.column_names}."
        )
    following = rows["rejected"][1:] + rows["rejected"][:1]
    return rows.map(lambda _, index: {"rejected": following[index]}, with_indices=True)


def load_split(name: str, split: str) -> Dataset:
    """All rows of one split of an embedded task, a local file or folder, or a data set on the Hub.

    Raises:
        ArmError: there is no such task, path or split.
    """
    found = find_split(name, split)
    if found is None:
        there = [p.name for p in sorted(_folder(name).iterdir())] if _folder(name).is_dir() else "its splits"
        raise ArmError(f"data.name={name!r}: one file for split {split!r} expected, found {there}.")
    return found


def find_split(name: str, split: str) -> Dataset | None:
    """As `load_split`; None if there is no such split."""
    path = _folder(name)
    if path.is_dir():
        files = [p for p in sorted(path.iterdir()) if p.suffix in BUILDERS and split in p.stem.split(".")]
        if len(files) != 1:
            return None
        path = files[0]
    if path.is_file():
        return _read(path)
    if path.suffix in BUILDERS or name.startswith((".", "/")):
        raise ArmError(f"data.name={name!r}: no such file or folder. Embedded tasks: {embedded.task_names()}.")
    try:
        if split not in get_dataset_split_names(name):
            return None
        loaded: Any = load_dataset(name, split=split)
    except Exception as error:
        tasks = embedded.task_names()
        raise ArmError(
            f"data.name={name!r} is no embedded task {tasks}, no path, and the Hub says: {error}"
        ) from error
    return loaded


def _read(path: Path) -> Dataset:
    """The rows of a local file.

    Raises:
        ArmError: it is of another kind, damaged or empty, or its columns are not those that its first line names.
    """
    if path.suffix not in BUILDERS:
        raise ArmError(f"{path} is none of {sorted(BUILDERS)}.")
    if path.stat().st_size == 0:
        raise ArmError(f"{path} is empty: rows are expected.")
    strict: Any = {"encoding_errors": "strict"} if BUILDERS[path.suffix] != "parquet" else {}
    try:
        found: Any = load_dataset(BUILDERS[path.suffix], data_files=glob.escape(str(path)), split="train", **strict)
    except Exception as error:  # the parsers have many, most of them inside another
        why = error.__cause__ or error
        raise ArmError(
            f"{path} cannot be read as {BUILDERS[path.suffix]}: {why}. Rows in UTF-8, all with the same columns, are "
            "expected."
        ) from error
    try:
        found.data.validate(full=True)  # reads every text as UTF-8, which the parsers do not
    except ValueError as error:
        raise ArmError(f"{path} is damaged: {error}. Save it as UTF-8.") from error
    # what pandas calls the first columns of rows that are longer than the header
    if unnamed := [name for name in found.column_names if name.startswith(("__index_level_", "Unnamed: "))]:
        raise ArmError(f"{path}: its rows have {len(unnamed)} fields more than its first line names columns.")
    repeated = re.compile(rf"({'|'.join(map(re.escape, found.column_names))})\.\d+")  # pandas' name for a second one
    if path.suffix == ".csv" and (twice := next(filter(repeated.fullmatch, found.column_names), None)):
        raise ArmError(f"{path}: its first line names the column {twice.rpartition('.')[0]!r} twice. Rename one.")
    # such a column may name a file or an address, which would be opened
    if opened := [name for name, feature in found.features.items() if _opens(feature)]:
        raise ArmError(f"{path}: columns {opened} hold pictures or sound; text is expected. Remove them.")
    return found


def _opens(feature: Any) -> bool:
    return hasattr(feature, "decode_example") and type(feature).__name__ != "Json"  # a text or number of several types


def _folder(name: str) -> Path:
    return embedded.TASKS / name if name in embedded.task_names() else Path(name)
