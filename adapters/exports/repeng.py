"""repeng's `ControlVector` (github vgel/repeng): directions by block, as numpy arrays."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ._base import LOAD
from ._vectors import ConstantVectors, ExportError
from .safetensors import SafetensorsExport


class RepengExport(SafetensorsExport):
    """A safetensors file, and the lines that load it as repeng's object."""

    packages = ("repeng",)
    not_read = "repeng saves control vectors as GGUF: --from gguf. In Python: exports.repeng.read(control_vector)."
    python = (
        LOAD
        + """
import re
from repeng import ControlModel, ControlVector
from safetensors.torch import load_file
vectors = load_file({folder!r} + "/vectors.safetensors")
directions = {{int(re.findall(r"\\d+", name)[0]): vector.numpy() for name, vector in vectors.items()}}
model = ControlModel(model, list(directions))
model.set_control(ControlVector(model.model.config.model_type, directions), 1.0)
"""
    )

    def check(self, vectors: ConstantVectors, model: PeftModel) -> None:
        """Block outputs only."""
        self.check_blocks_only(vectors, "repeng")


def read(control_vector: Any) -> dict[int, Tensor]:
    """The directions of a `repeng.ControlVector`, by block; `adapter_of` turns them into an adapter.

    Raises:
        ExportError: the argument is another object.
    """
    if not hasattr(control_vector, "directions"):
        raise ExportError(f"{type(control_vector).__name__} is not a repeng.ControlVector.")
    return {int(layer): torch.as_tensor(d, dtype=torch.float32) for layer, d in control_vector.directions.items()}


TARGET = RepengExport()
