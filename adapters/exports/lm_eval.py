"""The file that lm-eval's model `steered` reads.

    lm_eval --model steered --model_args pretrained=BASE,steer_path=FOLDER/steer.pt --tasks ...

The format is a pickle by definition; ours holds tensors and plain values, so that `weights_only=True` reads it too.
Several vectors need lm-eval 0.4.13: in releases before, every hook used the last vector of the file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

from ._base import ADD, LOAD, Export
from ._read import block_of, load_tensors, number_of, row_of
from ._vectors import ConstantVectors, ExportError

FILE = "steer.pt"


class LmEvalExport(Export):
    """Vectors for lm-eval's `steered` model."""

    python = (
        LOAD
        + ADD
        + """
import torch
steer = torch.load({folder!r} + "/steer.pt", weights_only=True)
for name, part in steer.items():
    vector = part["steering_coefficient"] * part["steering_vector"]
    model.base_model.get_submodule(name).register_forward_hook(adding(vector.to(model.device)))
"""
    )
    note = (
        "With lm-eval: `lm_eval --model steered --model_args pretrained=BASE,steer_path=steer.pt --tasks ...`. "
        "`steer.pt` is a pickle, because lm-eval's format is one. Several vectors need lm-eval 0.4.13 or later."
    )

    def _read(self, source: Path, model: nn.Module) -> dict[int, Tensor]:
        """Read `steer.pt`, or a folder that contains it."""
        parts = load_tensors(source / FILE if source.is_dir() else source)
        if not isinstance(parts, dict) or not all(isinstance(part, dict) for part in parts.values()):
            raise ExportError(
                f"{source} is not a file of lm-eval's steered model, which holds a dictionary for each module."
            )
        vectors = {}
        for name, part in parts.items():
            if part.get("action") != "add" or part.get("head_index") is not None or part.get("bias") is not None:
                raise ExportError(f"{source}: {name} clamps, or steers single heads; only 'add' can be read.")
            scale = number_of(part.get("steering_coefficient", 1.0), f"{source}: coefficient of {name}")
            vectors[block_of(str(name), model)] = scale * row_of(part.get("steering_vector"), f"{source}: {name}")
        return vectors

    def check(self, vectors: ConstantVectors, model: PeftModel) -> None:
        """Only modules that lm-eval can find."""
        self._hookpoints(vectors, model)

    def write(self, vectors: ConstantVectors, model: PeftModel, folder: Path) -> None:
        """Write `steer.pt`."""
        part = {"steering_coefficient": 1.0, "action": "add", "bias": None}
        names = self._hookpoints(vectors, model)
        torch.save({names[n]: {"steering_vector": v, **part} for n, v in vectors.vectors.items()}, folder / FILE)

    def _hookpoints(self, vectors: ConstantVectors, model: PeftModel) -> dict[str, str]:
        """Names of the steered modules within `model.base_model` of the plain model, where lm-eval looks."""
        prefix = f"{model.get_base_model().base_model_prefix}."
        outside = [name for name in vectors.vectors if not name.startswith(prefix)]
        if outside:
            raise ExportError(
                f"{outside} are not inside {prefix[:-1]!r}, where lm-eval looks for modules. What works: peft."
            )
        return {name: name.removeprefix(prefix) for name in vectors.vectors}


TARGET = LmEvalExport()
