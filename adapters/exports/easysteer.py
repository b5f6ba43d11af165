"""EasySteer (github ZJU-REAL/EasySteer): a control vector as GGUF, and the fields of a request.

Its algorithm `direct` adds `scale` times the tensor `direction.N` to the output of block N, for the layers that a
request names; the trigger token -1 stands for every token.
"""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftModel
from torch import Tensor, nn

from ._read import inside, layer_of, load_json, number_of
from ._vectors import ConstantVectors, ExportError
from .gguf import FILE, GgufExport
from .gguf import read as read_gguf

REQUEST = "request.json"


class EasySteerExport(GgufExport):
    """`control-vector.gguf` and `request.json`, the fields of a `SteerVectorRequest`."""

    note = (
        "With EasySteer: `SteerVectorRequest(**json.load(open('request.json')))`, with the path of the file as the "
        "server sees it. The lines below do the same without vLLM."
    )
    verified_in = "EasySteer"

    def write(self, vectors: ConstantVectors, model: PeftModel, folder: Path) -> None:
        """Write both files."""
        super().write(vectors, model, folder)
        request = {
            "steer_vector_name": "vector",
            "steer_vector_int_id": 1,
            "steer_vector_local_path": FILE,
            "scale": 1.0,
            "target_layers": sorted(vectors.by_layer),
            "prefill_trigger_tokens": [-1],
            "generate_trigger_tokens": [-1],
            "algorithm": "direct",
            "normalize": False,
        }
        (folder / REQUEST).write_text(json.dumps(request, indent=1), encoding="utf-8")

    def _read(self, source: Path, model: nn.Module) -> dict[int, Tensor]:
        """Read a folder with both files."""
        request = load_json(source / REQUEST)
        if not isinstance(request, dict):
            raise ExportError(f"{source}: {REQUEST} must hold a single request (got {type(request).__name__}).")
        every = [-1]
        expected = {
            "algorithm": "direct",
            "normalize": False,
            "prefill_trigger_tokens": every,
            "generate_trigger_tokens": every,
        }
        for key, value in expected.items():
            if request.get(key) != value:
                raise ExportError(f"{source}: {key} is {request.get(key)!r:.80}, but only {value!r} can be read.")
        directions = read_gguf(inside(source, request.get("steer_vector_local_path")))
        scale = number_of(request.get("scale", 1.0), f"{source}: scale")
        layers = request.get("target_layers")
        targets = {*directions} if layers is None else {layer_of(one, f"{source}: target_layers") for one in layers}
        return {layer: scale * vector for layer, vector in directions.items() if layer in targets}


TARGET = EasySteerExport()
