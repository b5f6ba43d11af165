"""Stock PEFT: BEFT, a trained bias on the output of a linear map (PEFT 0.20 and later).

Exact where a block adds the output of its last linear map to the residual stream unchanged, as pre-norm blocks do. See
`_places` for how that is decided.
"""

from __future__ import annotations

import operator
import re
from functools import partial
from pathlib import Path

from peft import BeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from ..blocks import find_blocks
from ..saved import read_tensors
from ._base import LOAD, Export, ExportError
from ._places import linear_places
from ._read import load_json, row_of
from ._vectors import ConstantVectors, adapter_of, constant_vectors


class PeftExport(Export):
    """A folder that `PeftModel.from_pretrained` loads without this package."""

    python = LOAD + "from peft import PeftModel\nmodel = PeftModel.from_pretrained(model, {folder!r})\n"
    note = "`lm_eval --model hf --model_args pretrained=...,peft=FOLDER` and every other user of PEFT read it."

    def _read(self, source: Path, model: nn.Module) -> dict[int, Tensor]:
        """Read a BEFT folder. The effect of each bias on the output of its block is measured, and must not depend on
        the state."""
        config = load_json(source / "adapter_config.json")
        if not isinstance(config, dict) or config.get("peft_type") != "BEFT":
            kind = config.get("peft_type") if isinstance(config, dict) else None
            raise ExportError(
                f"{source} holds a {kind!r:.80} adapter. Only BEFT, one bias per map, can be read as a vector."
            )
        vectors: dict[int, Tensor] = {}
        for key, tensor in read_tensors(source / SAFETENSORS_WEIGHTS_NAME).items():
            match = re.fullmatch(r"base_model\.model\.(.+)\.beft_bias", key)
            if match is None:
                raise ExportError(f"{source}: {key!r:.80} is not the bias of a map.")
            layer, vector = _at_block(model, match[1], row_of(tensor.reshape(-1), f"{source}: {key}"))
            if layer in vectors:
                raise ExportError(
                    f"{source} has several biases in block {layer}, whose effects may not simply add up."
                )
            vectors[layer] = vector
        return vectors

    def check(self, vectors: ConstantVectors, model: PeftModel) -> None:
        """See `linear_places`."""
        linear_places(vectors, model, _is_linear)

    def write(self, vectors: ConstantVectors, model: PeftModel, folder: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`."""
        places = dict(linear_places(vectors, model, _is_linear).values())
        steering_config = model.active_peft_config
        config = BeftConfig(
            task_type="CAUSAL_LM",
            target_modules=sorted(places),
            base_model_name_or_path=steering_config.base_model_name_or_path,
            revision=steering_config.revision,
            inference_mode=True,
        )
        config.save_pretrained(str(folder))
        tensors = {f"base_model.model.{name}.beft_bias": vector[None].contiguous() for name, vector in places.items()}
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def _at_block(model: nn.Module, name: str, bias: Tensor) -> tuple[int, Tensor]:
    """The index of the block that contains a map, and the vector that the bias adds to that block's output."""
    for layer, (path, block) in enumerate(find_blocks(model)):
        if not name.startswith(f"{path}."):
            continue
        place = block.get_submodule(name.removeprefix(f"{path}."))
        steered = adapter_of(model, {layer: bias})
        try:
            places = linear_places(constant_vectors(steered), steered, partial(operator.is_, place))
            [(_, needed)] = places.values()
        finally:
            steered.unload()
        # A bias of `needed` at the map adds `bias` at the block, and the effect is linear.
        return layer, bias * float(bias.norm() / needed.norm())
    raise ExportError(f"{name!r:.80} is in no block of this model.")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


TARGET = PeftExport()
