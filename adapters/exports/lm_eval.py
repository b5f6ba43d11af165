"""The file that lm-eval's model `steered` reads.

    lm_eval --model steered --model_args pretrained=BASE,steer_path=FOLDER/steer.pt --tasks ...

The format is a pickle of tensors and plain values by definition; lm-eval reads it with `weights_only=True`. Its hooks
all use the last vector of the file (a Python closure over the loop's variable), so one vector is all it can carry.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel

from ._base import ADD, LOAD, Export
from ._vectors import ConstantVectors, ExportError

FILE = "steer.pt"


class LmEvalExport(Export):
    """One vector for lm-eval's `steered` model."""

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
        "`steer.pt` is a pickle, because lm-eval's format is one."
    )

    def check(self, vectors: ConstantVectors, model: PeftModel) -> None:
        """One vector, inside lm-eval's view of the model."""
        if len(vectors.vectors) != 1:
            raise ExportError(
                f"{len(vectors.vectors)} vectors: lm-eval gives every hook the last one of the file. What works: "
                "peft, whose folder lm-eval reads with --model hf --model_args pretrained=BASE,peft=FOLDER."
            )
        self._hookpoints(vectors, model)

    def write(self, vectors: ConstantVectors, model: PeftModel, folder: Path) -> None:
        """`steer.pt`."""
        part = {"steering_coefficient": 1.0, "action": "add", "bias": None}
        names = self._hookpoints(vectors, model)
        torch.save({names[n]: {"steering_vector": v, **part} for n, v in vectors.vectors.items()}, folder / FILE)

    def _hookpoints(self, vectors: ConstantVectors, model: PeftModel) -> dict[str, str]:
        """Names of the steered modules within `model.base_model` of the plain model, where lm-eval looks."""
        prefix = f"{model.get_base_model().base_model_prefix}."
        outside = [name for name in vectors.vectors if not name.startswith(prefix)]
        if outside:
            raise ExportError(f"{outside} are not inside {prefix[:-1]!r}, where lm-eval looks. What works: peft.")
        return {name: name.removeprefix(prefix) for name in vectors.vectors}


TARGET = LmEvalExport()
