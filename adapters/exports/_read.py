"""Helpers for reading the files of other tools. Every value is checked, because the files are not trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import find_blocks
from ..description import FILE, embedded_in, parse
from ._vectors import ExportError

_LARGEST = 10**9  # bytes


def load_tensors(file: Path) -> Any:
    """Load a `torch.save` file that consists of tensors and plain values; anything else is not unpickled.

    Raises:
        ExportError: the file does not exist, is too large, or holds something else.
    """
    if not file.is_file() or file.stat().st_size > _LARGEST:
        raise ExportError(f"{file} is not a file of at most {_LARGEST} bytes.")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch can raise anything on a damaged file
        raise ExportError(f"{file} holds more than tensors, and is not unpickled: {error!s:.200}") from error


def load_json(file: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ExportError: the file does not exist, or is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{file} is not a readable JSON file: {error}") from error


def inside(folder: Path, name: Any) -> Path:
    """The path of a file that a request names; it must lie in the folder of the request.

    Raises:
        ExportError: it lies elsewhere.
    """
    file = folder / str(name)
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ExportError(f"{str(name)!r:.80} lies outside {folder}, so it is not read.")
    return file


def row_of(value: Any, what: str) -> Tensor:
    """Check a vector `(d,)`, and return it in fp32.

    Raises:
        ExportError: it is something else, or not finite.
    """
    if not isinstance(value, Tensor) or value.ndim != 1 or not value.is_floating_point() or not value.isfinite().all():
        form = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ExportError(f"{what} must be one finite vector (got {form}).")
    return value.float()


def number_of(value: Any, what: str) -> float:
    """Check a finite number, and return it.

    Raises:
        ExportError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise ExportError(f"{what} must be a finite number (got {value!r:.80}).")
    return float(value)


def layer_of(value: Any, what: str) -> int:
    """Check the index of a block, and return it. Whether the model has this block is checked with the adapter.

    Raises:
        ExportError: it is not a whole number of 0 or more.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ExportError(f"{what} must be the index of a block, 0 or more (got {value!r:.80}).")
    return value


def block_of(name: str, model: nn.Module) -> int:
    """The index of the block with a module name, which may lack the prefix of the list of blocks.

    Raises:
        ExportError: the model has no such block.
    """
    blocks = [path for path, _ in find_blocks(model)]
    for index, path in enumerate(blocks):
        if path == name or path.endswith(f".{name}"):
            return index
    raise ExportError(f"{name!r:.80} is not a block of this model; its blocks are {blocks[0]} ... {blocks[-1]}.")


def description_of(source: Path) -> dict[str, Any] | None:
    """The description of a source, from its folder, from beside the file, or from a safetensors file; None if missing.

    Raises:
        ValueError: it is damaged.
    """
    if source.suffix == ".safetensors" and source.is_file():
        return embedded_in(source)
    file = (source if source.is_dir() else source.parent) / FILE
    return parse(file.read_bytes(), str(file)) if file.is_file() else None
