"""vllm-lens (github UKGovernmentBEIS/vllm-lens): the JSON of its `SteeringVector`, which requests carry.

`activations` are `(layers, d)`, as base64 of their bytes with dtype and shape; row i times `scale` is added to the
output of block `layer_indices[i]`.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from ._base import ADD, LOAD, Export
from ._read import layer_of, load_json, number_of, row_of
from ._vectors import ConstantVectors, ExportError

FILE = "steering_vector_lens.json"
_DTYPES = ("float32", "float16", "float64")


class VllmLensExport(Export):
    """One JSON file."""

    python = (
        LOAD
        + ADD
        + """
import base64, json
import numpy, torch
lens = json.load(open({folder!r} + "/steering_vector_lens.json"))
packed = lens["activations"]
rows = numpy.frombuffer(base64.b64decode(packed["data"]), packed["dtype"]).reshape(packed["shape"])
for layer, row in zip(lens["layer_indices"], rows):
    block = model.get_submodule("BLOCKS")[layer]
    block.register_forward_hook(adding(lens["scale"] * torch.tensor(row, device=model.device)))
"""
    )
    note = (
        "With vllm-lens: `SteeringVector.model_validate(json.load(open('steering_vector_lens.json')))`, or the JSON "
        "itself in the `apply_steering_vectors` of a request. The lines below do the same without vLLM."
    )
    verified_in = "vLLM with vllm-lens"

    def check(self, vectors: ConstantVectors, model: PeftModel) -> None:
        """Block outputs only."""
        self.check_blocks_only(vectors, "vllm-lens")

    def write(self, vectors: ConstantVectors, model: PeftModel, folder: Path) -> None:
        """Write `steering_vector_lens.json`."""
        layers = sorted(vectors.by_layer)
        rows = torch.stack([vectors.by_layer[layer] for layer in layers]).contiguous().numpy()
        packed = {
            "data": base64.b64encode(rows.tobytes()).decode("ascii"),
            "dtype": "float32",
            "original_dtype": "torch.float32",
            "shape": [*rows.shape],
        }
        values = {
            "activations": packed,
            "layer_indices": layers,
            "scale": 1.0,
            "norm_match": False,
            "position_indices": None,
        }
        (folder / FILE).write_text(json.dumps(values), encoding="utf-8")

    def _read(self, source: Path, model: nn.Module) -> dict[int, Tensor]:
        """Read such a file, or a folder that contains it."""
        file = source / FILE if source.is_dir() else source
        values = load_json(file)
        if not isinstance(values, dict) or not {"activations", "layer_indices"} <= {*values}:
            raise ExportError(f"{file} is not a SteeringVector of vllm-lens.")
        if values.get("norm_match") or values.get("position_indices") is not None:
            raise ExportError(
                f"{file}: norm_match and position_indices depend on the state or the token, so they cannot be read."
            )
        layers = [layer_of(one, f"{file}: layer_indices") for one in values["layer_indices"]]
        rows = _unpacked(values["activations"], file)
        if rows.ndim != 2 or len(rows) != len(layers) or len({*layers}) != len(layers):
            raise ExportError(f"{file}: activations {tuple(rows.shape)} must have a row for each of {layers}.")
        scale = number_of(values.get("scale", 1.0), f"{file}: scale")
        return {layer: scale * row_of(row, f"{file}: {layer}") for layer, row in zip(layers, rows, strict=True)}


def _unpacked(packed: object, file: Path) -> Tensor:
    """Decode the tensor of a base64 entry.

    Raises:
        ExportError: it is compressed, of another dtype, or does not match its shape.
    """
    if not isinstance(packed, dict) or packed.get("dtype") not in _DTYPES or packed.get("compression") is not None:
        raise ExportError(
            f"{file}: activations must be uncompressed numbers of {', '.join(_DTYPES)}. In Python, "
            "vllm-lens reads it: save sv.activations.float() and write them without compression."
        )
    try:
        values = np.frombuffer(base64.b64decode(packed["data"], validate=True), packed["dtype"])
        shape = [int(size) for size in packed["shape"]]
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ExportError(f"{file}: activations are damaged: {error}") from error
    if math.prod(shape) != len(values) or min(shape, default=0) < 1:
        raise ExportError(f"{file}: {len(values)} numbers do not have the shape {shape}.")
    return torch.tensor(values.reshape(shape))


TARGET = VllmLensExport()
