"""Load rows by name: of an embedded task, a local file or folder, or a Hub data set; a single file is divided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, get_dataset_split_names, load_dataset

from steertune.recipes.lab import embedded
from steertune.recipes.lab.columns import Reading, named
from steertune.recipes.lab.division import Division, divide
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.reading import BUILDERS, place, read_file
from steertune.recipes.lab.similarity import By, told_apart_by


@dataclass(frozen=True)
class Parts:
    """All rows of a data set, divided into training and test rows.

    Attributes:
        by: What tells the rows apart.
        note: How many rows each part has, and how the split was made.
        places: Map the number of a training row, and that of a test row, to its place in the data.
        division: How a single file was divided; None for two files or splits.
        whole: All rows of a single file; None for two files or splits.
    """

    train: Dataset
    test: Dataset
    by: By
    note: str
    places: tuple[Callable[[int], str], Callable[[int], str]]
    division: Division | None = None
    whole: Dataset | None = None


def load_parts(
    name: str, train_split: str = "train", test_split: str = "test", reading: Reading | None = None
) -> Parts:
    """The training and test rows of a data set: two splits, or the two parts of a single file or split.

    Raises:
        ArmError: the data set or split does not exist, or a row is not an example.
    """
    called = Path(name).name.replace("`", "'")  # pages show it as code
    only = _only_split(name, train_split, test_split)
    train = _named(name, train_split if only is None else only, reading)
    if only is None:
        test = _named(name, test_split, reading)
        by = told_apart_by([*train.rows.to_list(), *test.rows.to_list()], train.own_prompts)
        note = f"`{called}` has {len(train.rows)} training rows and {len(test.rows)} test rows."
        return Parts(train.rows, test.rows, by, note, (train.place, test.place))
    by = told_apart_by(train.rows.to_list(), train.own_prompts)
    division = divide(train.rows.to_list(), by)
    places = tuple(lambda i, part=part: train.place(part[i]) for part in (division.train, division.held_out))
    rows = [train.rows.select(part) for part in (division.train, division.held_out)]
    return Parts(rows[0], rows[1], by, division.note(called, by), (places[0], places[1]), division, train.rows)


def load_split(name: str, split: str, reading: Reading | None = None) -> Dataset:
    """All rows of one split of an embedded task, a local file or folder, or a data set on the Hub.

    Raises:
        ArmError: the task, path or split does not exist, or a row is not an example.
    """
    return _named(name, split, reading).rows


def find_split(name: str, split: str, reading: Reading | None = None) -> Dataset | None:
    """Like `load_split`; None if the split does not exist."""
    rows = _named_or_none(name, split, reading)
    return None if rows is None else rows.rows


@dataclass(frozen=True)
class _Rows:
    """The rows of one split, whether their prompts are in the data, and the place of each row."""

    rows: Dataset
    own_prompts: bool
    place: Callable[[int], str]


def _named(name: str, split: str, reading: Reading | None) -> _Rows:
    rows = _named_or_none(name, split, reading)
    if rows is None:
        files = [p.name for p in sorted(_folder(name).iterdir())] if _folder(name).is_dir() else "its splits"
        raise ArmError(f"data.name={name!r}: one file for split {split!r} expected, found {files}.")
    return rows


def _named_or_none(name: str, split: str, reading: Reading | None) -> _Rows | None:
    path = _file(name, split)
    rows = _on_hub(name, split) if path is None else read_file(path)
    if rows is None:
        return None
    where = row_place(name, split)
    rows, own_prompts, kept = named(rows, replace(reading or Reading(), name=name, place=where))
    return _Rows(rows, own_prompts, lambda index: where(kept[index]))


def row_place(name: str, split: str) -> Callable[[int], str]:
    """Maps the number of a row to its place, for messages."""
    path = _file(name, split)
    return partial(place, path) if path is not None else lambda index: f"{name}, split {split}, row {index + 1}"


def has_one_split(name: str, train_split: str = "train", test_split: str = "test") -> bool:
    """Whether a data set is a single file, or has a single split."""
    return _only_split(name, train_split, test_split) is not None


def _file(name: str, split: str) -> Path | None:
    """The local file of a split, or None."""
    path = _folder(name)
    if path.is_dir():
        files = [p for p in _data_files(path) if split in p.stem.split(".")]
        return files[0] if len(files) == 1 else None
    if path.is_file():
        return path
    if path.suffix in BUILDERS or name.startswith((".", "/")):
        raise ArmError(f"data.name={name!r}: no such file or folder. Embedded tasks: {embedded.task_names()}.")
    return None


def _data_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.suffix in BUILDERS]


def _only_split(name: str, train_split: str, test_split: str) -> str | None:
    """The split that holds all rows, for a file, a folder with one file, or a data set with one split; None if there
    are a training and a test split."""
    path = _folder(name)
    if path.is_file() or train_split == test_split:
        return train_split
    if path.is_dir():
        files = _data_files(path)
        return train_split if len(files) == 1 and train_split in files[0].stem.split(".") else None
    _file(name, train_split)  # refuses a path that does not exist, instead of looking for it on the Hub
    return train_split if _hub_splits(name) == [train_split] else None


def _hub_splits(name: str) -> list[str]:
    try:
        return get_dataset_split_names(name)
    except Exception as error:
        tasks = embedded.task_names()
        raise ArmError(
            f"data.name={name!r} is neither an embedded task {tasks} nor a path, and the Hub says: {error}"
        ) from error


def _on_hub(name: str, split: str) -> Dataset | None:
    if _folder(name).exists() or split not in _hub_splits(name):
        return None
    try:
        loaded: Any = load_dataset(name, split=split)
    except Exception as error:
        raise ArmError(f"data.name={name!r}: the Hub says: {error}") from error
    return loaded


def _folder(name: str) -> Path:
    return embedded.TASKS / name if name in embedded.task_names() else Path(name)
