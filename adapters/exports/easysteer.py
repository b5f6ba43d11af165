"""EasySteer (github ZJU-REAL/EasySteer): a control vector as GGUF, and the fields of a request.

Its algorithm `direct` adds `scale` times the tensor `direction.N` to the output of block N, for the layers that a
request names. A request is a `SteeringSpec`, since its releases for vLLM 0.26; the `SteerVectorRequest` of earlier
ones, whose trigger token -1 stands for every token, is read and no longer written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from ._read import inside, layer_of, load_json, number_of
from ._vectors import ConstantVectors, ExportError
from .gguf import FILE, GgufExport
from .gguf import read as read_gguf

SPEC, REQUEST = "steering.json", "request.json"
_EVERYWHERE = {"prompt": "all", "generation": "all"}
_FORMER = {"prefill_trigger_tokens": [-1], "generate_trigger_tokens": [-1]}


class EasySteerExport(GgufExport):
    """`control-vector.gguf` and `steering.json`, a `SteeringSpec`."""

    note = (
        "With EasySteer: `SteeringSpec(**json.load(open('steering.json')))` in Python, or the same JSON as the field "
        "`steering` of a request, with the path of the file as the server sees it. The lines below do the same "
        "without vLLM."
    )
    verified_in = "EasySteer"

    def write(self, vectors: ConstantVectors, model: PeftModel, folder: Path) -> None:
        """Write both files."""
        super().write(vectors, model, folder)
        vector = {
            "source": FILE,
            "algorithm": "direct",
            "scale": 1.0,
            "layers": sorted(vectors.by_layer),
            "normalize": False,
            "apply": _EVERYWHERE,
        }
        (folder / SPEC).write_text(json.dumps({"vectors": [vector]}, indent=1), encoding="utf-8")

    def _read(self, source: Path, model: nn.Module) -> dict[int, Tensor]:
        """A folder with a control vector and a request of either form."""
        request, names = _request(source)
        for key, value in {"algorithm": "direct", "normalize": False, **names}.items():
            if request.get(key) != value:
                raise ExportError(f"{source}: {key} is {request.get(key)!r:.80}, and only {value!r} can be read.")
        directions = read_gguf(inside(source, request.get("source")))
        scale = number_of(request.get("scale", 1.0), f"{source}: scale")
        layers = request.get("layers")
        wanted = {*directions} if layers is None else {layer_of(one, f"{source}: layers") for one in layers}
        return {layer: scale * vector for layer, vector in directions.items() if layer in wanted}


def _request(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a request says, by the names of a `VectorSpec`, and where its vector must apply.

    Raises:
        ExportError: it is not a request of one vector.
    """
    if not (source / SPEC).is_file():
        former = load_json(source / REQUEST)
        if not isinstance(former, dict):
            raise ExportError(f"{source}: {REQUEST} must be one request.")
        renamed = {"source": former.get("steer_vector_local_path"), "layers": former.get("target_layers")}
        return {**former, **renamed}, _FORMER
    spec = load_json(source / SPEC)
    vectors = spec.get("vectors") if isinstance(spec, dict) else None
    if not isinstance(vectors, list) or len(vectors) != 1 or not isinstance(vectors[0], dict):
        raise ExportError(f"{source}: {SPEC} must have one vector.")
    return {"algorithm": "direct", "normalize": False, **vectors[0]}, {"apply": _EVERYWHERE}


TARGET = EasySteerExport()
