"""Load a base model with several vectors from their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from steertune.recipes.lab import zoo
from steertune.recipes.lab.data import adapter_config, base_of, load_model
from steertune.recipes.lab.files import ArmError, reasons, shown
from steertune.recipes.lab.tables import ModelTable
from steertune.recipes.serving.vectors import Vectors, check_vector_name


def load_vectors(
    folders: Mapping[str, Path], base: str | None = None, dtype: str = "float32", device: str = "cpu"
) -> tuple[Vectors, Any]:
    """A base model with some steering vectors, and its tokenizer.

    Args:
        folders: Name of a vector -> its adapter folder.
        base: Name of the base model, as in `ModelTable`; None: that of the first adapter.
        dtype: Number format of the base model.
        device: Device of the model.

    Raises:
        ArmError: there is no base model, or an adapter is unusable or was made for another base model.
    """
    for folder in folders.values():
        adapter_config(folder)
    if base is None and not folders:
        raise ArmError("No vector is given, so none names the base model. Give NAME=FOLDER, or --model.")
    try:
        given: Any = {"name": base, "dtype": dtype}
        table = base_of(next(iter(folders.values())), base, dtype) if folders else ModelTable(**given)
    except ValidationError as error:
        raise ArmError(reasons(error)) from error
    model, tokenizer = load_model(table)
    vectors = Vectors(model.to(device))  # pyright: ignore[reportArgumentType]
    for name, folder in folders.items():
        vectors.add(name, folder)
    return vectors, tokenizer


def named_folders(words: Sequence[str], name_by_folder: bool = False) -> dict[str, Path]:
    """Parse `NAME=FOLDER ...`; with `name_by_folder`, a `FOLDER` without a name is named after itself. Without it, the
    folders are adapters, and the embedded ones can be named as in `zoo.as_words`.

    Raises:
        ArmError: a word has another form, or a name is invalid or given twice.
    """
    folders: dict[str, Path] = {}
    for word in words if name_by_folder else chain.from_iterable(map(zoo.as_words, words)):
        name, equals, folder = word.partition("=")
        if name_by_folder and not equals:
            name, folder = Path(word).resolve().name, word
        elif not equals or not name or not folder:
            raise ArmError(f"{shown(word)} must be written NAME=FOLDER: a name for requests, and an adapter folder.")
        check_vector_name(name)
        if name in folders:
            raise ArmError(f"{name!r} is given twice.")
        folders[name] = Path(folder)
    return folders
