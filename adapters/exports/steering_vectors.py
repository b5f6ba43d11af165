"""The `SteeringVector` of the package steering-vectors: activations by block."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import Tensor

from ._base import LOAD
from ._vectors import ConstantVectors, ExportError
from .safetensors import SafetensorsExport

_TYPES = {"block": "decoder_block", "attention": "self_attn", "mlp": "mlp"}


class SteeringVectorsExport(SafetensorsExport):
    """A safetensors file, and the lines that load it as the package's object."""

    packages = ("steering_vectors",)
    not_read = "The package has no file format. In Python: exports.steering_vectors.read(steering_vector)."
    python = (
        LOAD
        + """
import re
from safetensors.torch import load_file
from steering_vectors import SteeringVector
vectors = load_file({folder!r} + "/vectors.safetensors")
activations = {{int(re.findall(r"\\d+", name)[0]): vector.to(model.device) for name, vector in vectors.items()}}
SteeringVector(layer_activations=activations, layer_type="TYPE").patch_activations(model)
"""
    )

    def lines(self, base: str, folder: str, model: PeftModel) -> str:
        """Like the parent, with the package's name for the site."""
        config: Any = model.peft_config[model.active_adapters[0]]
        return self.filled(self.python.replace("TYPE", _TYPES[config.site]), base, folder, model)

    def check(self, vectors: ConstantVectors, model: PeftModel) -> None:
        """Every site that has a name in the package."""
        if vectors.site not in _TYPES:
            raise ExportError(f"site={vectors.site!r} must be one of {list(_TYPES)}.")


def read(steering_vector: Any) -> dict[int, Tensor]:
    """The vectors of a `steering_vectors.SteeringVector`, by block; `adapter_of` turns them into an adapter.

    Raises:
        ExportError: they are not for block outputs.
    """
    if not hasattr(steering_vector, "layer_activations"):
        raise ExportError(f"{type(steering_vector).__name__} is not a steering_vectors.SteeringVector.")
    if steering_vector.layer_type != "decoder_block":
        raise ExportError(f"layer_type={steering_vector.layer_type!r}: only 'decoder_block' vectors are read.")
    return {int(layer): vector.float() for layer, vector in steering_vector.layer_activations.items()}


TARGET = SteeringVectorsExport()
