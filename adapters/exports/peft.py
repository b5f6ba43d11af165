"""Stock PEFT: BEFT, a trained bias on the output of a linear map (PEFT 0.20 and later).

Exact where a block adds the output of its last linear map to the residual stream as it is: pre-norm blocks. See
`_places` for how that is decided.
"""

from __future__ import annotations

from pathlib import Path

from peft import BeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from ._base import LOAD, Export
from ._places import linear_places
from ._vectors import ConstantVectors


class PeftExport(Export):
    """A folder that `PeftModel.from_pretrained` loads without this package."""

    python = LOAD + "from peft import PeftModel\nmodel = PeftModel.from_pretrained(model, {folder!r})\n"
    note = "`lm_eval --model hf --model_args pretrained=...,peft=FOLDER` and every other user of PEFT read it."

    def check(self, vectors: ConstantVectors, model: PeftModel) -> None:
        """See `linear_places`."""
        linear_places(vectors, model, _is_linear)

    def write(self, vectors: ConstantVectors, model: PeftModel, folder: Path) -> None:
        """`adapter_config.json` and `adapter_model.safetensors`."""
        places = dict(linear_places(vectors, model, _is_linear).values())
        known = model.active_peft_config
        config = BeftConfig(
            task_type="CAUSAL_LM",
            target_modules=sorted(places),
            base_model_name_or_path=known.base_model_name_or_path,
            revision=known.revision,
            inference_mode=True,
        )
        config.save_pretrained(str(folder))
        tensors = {f"base_model.model.{name}.beft_bias": vector[None].contiguous() for name, vector in places.items()}
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


TARGET = PeftExport()
