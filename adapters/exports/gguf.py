"""llama.cpp's control vector: a GGUF file that `--control-vector` adds to the residual stream.

Tensor `direction.N` is added to the output of block N, at every position. N starts at 1: block 0 has no place in the
format. llama.cpp does not check which model a vector was made for.
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
_MOST_VALUES = 10_000  # of the header; llama.cpp's own files have seven a layer


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
        """A control vector; of an export's folder the one in it."""
        return read(source / FILE if source.is_dir() else source)

    def check(self, vectors: ConstantVectors, model: PeftModel) -> None:
        """Block outputs only, and not that of block 0."""
        self.check_blocks_only(vectors, "llama.cpp")
        if 0 in vectors.by_layer:
            raise ExportError(
                "Layer 0 is not representable: llama.cpp's format starts at direction.1. Train layers=[1, ...], or "
                "export to safetensors."
            )

    def write(self, vectors: ConstantVectors, model: PeftModel, folder: Path) -> None:
        """`control-vector.gguf`."""
        from gguf import GGUFWriter

        writer = GGUFWriter(str(folder / FILE), _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", text_config(model.get_base_model()).model_type)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(vectors.by_layer))
        # what the format itself has no place for; llama.cpp reads past keys that it does not know
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
    """What the control vector says about itself (see `description.py`); None for a file of another tool.

    Raises:
        ExportError: it is not readable.
    """
    with _opened(file) as reader:
        field = reader.fields.get(_DESCRIPTION)
        facts = None if field is None else bytes(field.parts[field.data[0]])
    try:
        return None if facts is None else parse(facts, str(file))
    except ValueError as error:
        raise ExportError(f"{file}: {error}") from error


def read(file: str | Path) -> dict[int, Tensor]:
    """The directions of a control vector, by block; `adapter_of` makes an adapter of them.

    Raises:
        ExportError: the file is not a control vector, or does not hold finite fp32 rows of one width.
    """
    with _opened(file) as reader:
        fields = reader.fields["general.architecture"]
        architecture = bytes(fields.parts[fields.data[0]]).decode()
        tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    if architecture != _ARCHITECTURE:
        raise ExportError(f"{file} holds a {architecture!r} model, not a control vector.")
    found = {}
    for name, vector in tensors.items():
        match = re.fullmatch(r"direction\.([1-9]\d{0,5})", name, re.ASCII)
        if match is None:
            raise ExportError(f"{file}: tensor {name!r} must be named direction.N with N from 1.")
        if vector.ndim != 1 or vector.dtype != torch.float32 or not vector.isfinite().all():
            raise ExportError(
                f"{file}: {name} is {vector.dtype} {tuple(vector.shape)}; expected are finite fp32 rows."
            )
        found[int(match[1])] = vector
    if len({len(vector) for vector in found.values()}) != 1:
        raise ExportError(f"{file}: directions of one width are expected, found {sorted(map(len, found.values()))}.")
    return found


@contextmanager
def _opened(file: str | Path) -> Iterator[Any]:
    """A reader of a file; what goes wrong inside becomes an ExportError."""
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
                raise ValueError("its header names more than the file holds, or than a control vector has")
            return super()._get(offset, dtype, count, *args, **kwargs)

    return Bounded(file)


TARGET = GgufExport()
