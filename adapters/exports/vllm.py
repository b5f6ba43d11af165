"""vLLM, through its plug-in hotwire (github moudrkat/hotwire-vllm): CUDA graphs stay on, and every request names its
vector, layer and scale.

The plug-in reads a folder of `NAME.pt` files with `weights_only=True`, each one tensor `(blocks of the model, d)`. Row
i is added to the output of block i. Requests carry `{"id": NAME, "layer": i, "scale": s}`, or a list of these.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..blocks import find_blocks
from ._base import ADD, LOAD, Export
from ._read import inside, layer_of, load_json, load_tensors, number_of, row_of
from ._vectors import ConstantVectors, ExportError

NAME = "vector"


class VllmExport(Export):
    """`vectors/vector.pt`, and `request.json`: the fields of a request that uses it."""

    python = (
        LOAD
        + ADD
        + """
import json
import torch
vectors = torch.load({folder!r} + "/vectors/vector.pt", weights_only=True)
for part in json.load(open({folder!r} + "/request.json")):
    block = model.get_submodule("BLOCKS")[part["layer"]]
    block.register_forward_hook(adding((part["scale"] * vectors[part["layer"]]).to(model.device)))
"""
    )
    note = (
        "With vLLM: `pip install hotwire-vllm`, `HOTWIRE_VECTORS=vectors vllm serve BASE`, and in a request "
        '`"vllm_xargs": {"hotwire": "..."}` with the text of `request.json` (offline: '
        '`SamplingParams(extra_args={"hotwire": ...})`); other scales are other strengths. With vllm-lens: '
        "`SteeringVector(activations=vectors[layers], layer_indices=layers)` of the same file. The lines below do the "
        "same without vLLM; only these lines were run."
    )

    def _read(self, source: Path, model: nn.Module) -> dict[int, Tensor]:
        """Read a folder with `request.json` and the vectors that it names, or all non-zero rows of one `NAME.pt`."""
        if not source.is_dir():
            rows = load_tensors(source)
            if not isinstance(rows, Tensor) or rows.ndim != 2:
                raise ExportError(f"{source} is not a hotwire vector, which is one tensor (blocks, d).")
            return {i: row_of(row, f"{source}: row {i}") for i, row in enumerate(rows) if row.any()}
        parts = load_json(source / "request.json")
        vectors: dict[int, Tensor] = {}
        for part in parts if isinstance(parts, list) else [parts]:
            if not isinstance(part, dict) or not {"id", "layer"} <= {*part}:
                raise ExportError(f"{source}: request.json must hold id, layer and scale (got {part!r:.80}).")
            rows = load_tensors(inside(source / "vectors", f"{part['id']}.pt"))
            layer = layer_of(part["layer"], f"{source}: layer")
            if not isinstance(rows, Tensor) or rows.ndim != 2 or layer >= len(rows):
                raise ExportError(f"{source}: {part['id']} has no row for layer {layer}.")
            scaled = number_of(part.get("scale", 1.0), f"{source}: scale") * row_of(rows[layer], f"{source}: {layer}")
            vectors[layer] = vectors.get(layer, torch.zeros_like(scaled)) + scaled
        return vectors

    def check(self, vectors: ConstantVectors, model: PeftModel) -> None:
        """Block outputs only."""
        self.check_blocks_only(vectors, "vLLM's plug-in")

    def write(self, vectors: ConstantVectors, model: PeftModel, folder: Path) -> None:
        """Write `vectors/vector.pt` and `request.json`."""
        by_layer = vectors.by_layer
        rows = torch.zeros(len(find_blocks(model.get_base_model())), len(next(iter(by_layer.values()))))
        for layer, vector in by_layer.items():
            rows[layer] = vector
        (folder / "vectors").mkdir()
        torch.save(rows, folder / "vectors" / f"{NAME}.pt")
        parts = [{"id": NAME, "layer": layer, "scale": 1.0} for layer in sorted(by_layer)]
        (folder / "request.json").write_text(json.dumps(parts), encoding="utf-8")


TARGET = VllmExport()
