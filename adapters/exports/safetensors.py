"""A plain safetensors file: the full name of the steered module -> what is added to its output, `(d,)` in fp32."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from ..saved import read_tensors
from ._base import ADD, LOAD, Export
from ._read import block_of, row_of
from ._vectors import ConstantVectors

FILE = "vectors.safetensors"


class SafetensorsExport(Export):
    """One file, and the few lines that use it."""

    python = (
        LOAD
        + ADD
        + """
from safetensors.torch import load_file
for name, vector in load_file({folder!r} + "/vectors.safetensors").items():
    model.get_submodule(name).register_forward_hook(adding(vector.to(model.device)))
"""
    )
    note = "Keys of `vectors.safetensors` are full names of modules in the base; values are added to their output."

    def _read(self, source: Path, model: nn.Module) -> dict[int, Tensor]:
        """Read `vectors.safetensors`, or a folder that contains it: the names of blocks to vectors."""
        tensors = read_tensors(source / FILE if source.is_dir() else source)
        return {block_of(name, model): row_of(vector, f"{source}: {name}") for name, vector in tensors.items()}

    def check(self, vectors: ConstantVectors, model: PeftModel) -> None:
        """Every constant vector can be exported."""

    def write(self, vectors: ConstantVectors, model: PeftModel, folder: Path) -> None:
        """Write `vectors.safetensors`."""
        metadata = {"format": "pt", "steering_vector": json.dumps(vectors.description)}
        save_file({name: v.contiguous() for name, v in vectors.vectors.items()}, folder / FILE, metadata)


TARGET = SafetensorsExport()
