"""llama.cpp's control vector: a GGUF file that `--control-vector` adds to the residual stream.

Tensor `direction.N` is added to the output of block N, at every position. N starts at 1: the format cannot represent
block 0. llama.cpp does not check which model a vector was made for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from ..blocks import text_config
from ..description import parse
from ._base import ADD, LOAD, Export
from ._vectors import ConstantVectors, ExportError

FILE = "control-vector.gguf"
_ARCHITECTURE = "controlvector"
_DESCRIPTION = "steering_vector.description"
_MOST_VALUES = 10_000  # in the header; llama.cpp's own files have seven per layer


class GgufExport(Export):
    """A control vector of llama.cpp, which repeng and EasySteer read too."""

    packages = ("gguf",)
    python = (
        LOAD
        + ADD
        + """
import torch
from gguf import GGUFReader
for tensor in GGUFReader({folder!r} + "/control-vector.gguf").tensors:
    layer = int(tensor.name.removeprefix("direction."))
    block = model.get_submodule("BLOCKS")[layer]
    block.register_forward_hook(adding(torch.tensor(tensor.data, device=model.device)))
"""
    )
    note = (
        "With llama.cpp: `llama-cli -m MODEL.gguf --control-vector control-vector.gguf` (`--control-vector-scaled "
        "FILE 2.0` for twice the strength). llama.cpp does not check that the vector was made for the model."
    )

    def _read(self, source: Path, model: nn.Module) -> dict[int, Tensor]:
        """Read a control vector, or the one in the folder of an export."""
        return read(source / FILE if source.is_dir() else source)

    def check(self, vectors: ConstantVectors, model: PeftModel) -> None:
        """Block outputs only, except that of block 0."""
        self.check_blocks_only(vectors, "llama.cpp")
        if 0 in vectors.by_layer:
            raise ExportError(
                "Layer 0 is not representable: llama.cpp's format starts at direction.1. Train layers=[1, ...], or "
                "export to safetensors."
            )

    def write(self, vectors: ConstantVectors, model: PeftModel, folder: Path) -> None:
        """Write `control-vector.gguf`."""
        from gguf import GGUFWriter

        writer = GGUFWriter(str(folder / FILE), _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", text_config(model.get_base_model()).model_type)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(vectors.by_layer))
        # The format has no fields for these; llama.cpp ignores unknown keys.
        for key in ("operation", "site", "positions"):
            writer.add_string(f"steering_vector.{key}", vectors.description[key])
        writer.add_string(_DESCRIPTION, json.dumps(vectors.description))
        for layer, vector in sorted(vectors.by_layer.items()):
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_facts(file: str | Path) -> dict[str, Any] | None:
    """The description in a control vector (see `description.py`); None for a file of another tool.

    Raises:
        ExportError: the file is not readable.
    """
    with _opened(file) as reader:
        field = reader.fields.get(_DESCRIPTION)
        facts = None if field is None else bytes(field.parts[field.data[0]])
    try:
        return None if facts is None else parse(facts, str(file))
    except ValueError as error:
        raise ExportError(f"{file}: {error}") from error


def read(file: str | Path) -> dict[int, Tensor]:
    """The directions of a control vector, by block; `adapter_of` turns them into an adapter.

    Raises:
        ExportError: the file is not a control vector, or does not hold finite fp32 rows of one width.
    """
    with _opened(file) as reader:
        fields = reader.fields["general.architecture"]
        architecture = bytes(fields.parts[fields.data[0]]).decode()
        tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    if architecture != _ARCHITECTURE:
        raise ExportError(f"{file} holds a {architecture!r} model, not a control vector.")
    directions = {}
    for name, vector in tensors.items():
        match = re.fullmatch(r"direction\.([1-9]\d{0,5})", name, re.ASCII)
        if match is None:
            raise ExportError(f"{file}: tensor {name!r} must be named direction.N with N from 1.")
        if vector.ndim != 1 or vector.dtype != torch.float32 or not vector.isfinite().all():
            raise ExportError(
                f"{file}: {name} must be a finite fp32 vector (got {vector.dtype} {tuple(vector.shape)})."
            )
        directions[int(match[1])] = vector
    if len({len(vector) for vector in directions.values()}) != 1:
        widths = sorted(map(len, directions.values()))
        raise ExportError(f"{file}: all directions must have the same width (got {widths}).")
    return directions


@contextmanager
def _opened(file: str | Path) -> Iterator[Any]:
    """Yield a reader of a file; errors inside become an ExportError."""
    try:
        if not Path(file).is_file():
            raise OSError("the file does not exist")
        yield _reader(str(file))
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError) as error:
        raise ExportError(f"{file} is not a readable GGUF file: {error}") from error


def _reader(file: str) -> Any:
    """A reader that checks header numbers, which the package's own reader trusts, against the file's size and against
    the number of values that a control vector can have."""
    from gguf import GGUFReader

    class Bounded(GGUFReader):
        reads = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **kwargs: Any) -> Any:
            self.reads += 1
            if self.reads > _MOST_VALUES or int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("its header declares more than the file holds, or than a control vector can hold")
            return super()._get(offset, dtype, count, *args, **kwargs)

    return Bounded(file)


TARGET = GgufExport()
