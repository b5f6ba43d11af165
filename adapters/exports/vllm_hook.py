"""vLLM-Hook (github IBM/vLLM-Hook): a `.pt` with one direction, and the steering part of a request.

Its method `add_vector` adds `coefficient · dir` to the output of block `optimal_layer`. One request has one vector, so
several layers are possible only where all have the same one.
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

FILE, REQUEST = "vector.pt", "steer.json"


class VllmHookExport(Export):
    """`vector.pt` and `steer.json`."""

    python = (
        LOAD
        + ADD
        + """
import json
import torch
steer = json.load(open({folder!r} + "/steer.json"))["steering"]
vector = steer["coefficient"] * torch.load({folder!r} + "/" + steer["vector_path"], weights_only=True)["dir"]
for layer in steer["optimal_layer"]:
    model.get_submodule("BLOCKS")[layer].register_forward_hook(adding(vector.to(model.device)))
"""
    )
    note = (
        "With vLLM-Hook: the text of `steering` in `steer.json` is what a request carries as "
        '`"vllm_xargs": {"steer": "..."}`; `vector_path` must be the path as the server sees it. The lines below do '
        "the same without vLLM."
    )
    verified_in = "vLLM with vLLM-Hook"

    def check(self, vectors: ConstantVectors, model: PeftModel) -> None:
        """Block outputs only, with the same vector at all layers."""
        self.check_blocks_only(vectors, "vLLM-Hook")
        first, *others = vectors.by_layer.values()
        if not all(torch.equal(first, other) for other in others):
            raise ExportError(
                f"Layers {sorted(vectors.by_layer)} have different vectors, but a vLLM-Hook request holds only one. "
                "Train one layer or tied=True. What works: vllm, vllm_lens, easysteer."
            )

    def write(self, vectors: ConstantVectors, model: PeftModel, folder: Path) -> None:
        """Write both files."""
        layers = sorted(vectors.by_layer)
        torch.save({"dir": vectors.by_layer[layers[0]]}, folder / FILE)
        steering = {
            "method": "add_vector",
            "coefficient": 1.0,
            "optimal_layer": layers,
            "vector_path": FILE,
            "phase": "both",
            "positions": "all_tokens",
        }
        (folder / REQUEST).write_text(json.dumps({"steering": steering}), encoding="utf-8")

    def _read(self, source: Path, model: nn.Module) -> dict[int, Tensor]:
        """Read a folder with both files."""
        values = load_json(source / REQUEST)
        steer = values.get("steering", values) if isinstance(values, dict) else {}
        expected = {"method": ("add_vector",), "phase": ("both", None), "positions": ("all_tokens", None)}
        for key, allowed in expected.items():
            if steer.get(key) not in allowed:
                raise ExportError(f"{source}: {key} is {steer.get(key)!r:.80}, but only {allowed[0]!r} can be read.")
        if steer.get("apply_at_all_positions", True) is not True:
            raise ExportError(f"{source}: it steers only the last token; only vectors for all tokens can be read.")
        data = load_tensors(inside(source, steer.get("vector_path")))
        if not isinstance(data, dict) or "dir" not in data:
            raise ExportError(f"{source}: {steer.get('vector_path')!r:.80} holds no 'dir'.")
        scale = number_of(steer.get("coefficient"), f"{source}: coefficient")
        vector = scale * row_of(torch.as_tensor(data["dir"]).reshape(-1), f"{source}: dir")
        layers = steer.get("optimal_layer")
        if layers == "all":
            layers = [*range(len(find_blocks(model)))]
        listed = layers if isinstance(layers, list) else [layers]
        return {layer_of(layer, f"{source}: optimal_layer"): vector for layer in listed}


TARGET = VllmHookExport()
