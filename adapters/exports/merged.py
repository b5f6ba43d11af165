"""Merge the vector into the base model's weights: a bias that the model's configuration declares.

GPT-2 has a bias where a block writes; Llama gets one with `mlp_bias=True`. Saving and reloading silently drops a bias
that the configuration does not declare, so such a bias is never written.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ..model import CHILD
from ._base import LOAD, Export
from ._places import linear_places
from ._vectors import ConstantVectors, ExportError


class MergedExport(Export):
    """A whole model that `AutoModelForCausalLM.from_pretrained` loads, with its generation configuration."""

    python = LOAD.replace("{base!r}", "{folder!r}")
    note = "The folder holds a whole model. If it includes the tokenizer, servers can load it: `vllm serve FOLDER`."
    whole_model = True
    not_read = "steertune audit FOLDER --output OUT finds a vector in a checkpoint and extracts it as an adapter."

    def check(self, vectors: ConstantVectors, model: PeftModel) -> None:
        """Like `linear_places`, and the model's configuration must allow a bias at these places."""
        _with_biases(model.get_base_model(), _places(vectors, model))

    def write(self, vectors: ConstantVectors, model: PeftModel, folder: Path) -> None:
        """Write the model with `save_pretrained`."""
        base, places = model.get_base_model(), _places(vectors, model)
        config = _with_biases(base, places)
        with torch.device("meta"):
            merged = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
        state = {name: value for name, value in base.state_dict().items() if f".{CHILD}." not in name}
        for name, value in merged.state_dict().items():
            if name.endswith(".bias") and name not in state:  # the other biases that the switch adds
                state[name] = torch.zeros(value.shape, dtype=model.dtype, device=model.device)
        for name, vector in places.items():
            old = state[f"{name}.bias"]
            state[f"{name}.bias"] = (old.float() + vector.to(old.device)).to(old.dtype)
        merged.load_state_dict(state, assign=True)
        merged.generation_config = copy.deepcopy(getattr(base, "generation_config", None))
        merged.save_pretrained(folder)


def _places(vectors: ConstantVectors, model: PeftModel) -> dict[str, Tensor]:
    return dict(linear_places(vectors, model, lambda module: isinstance(module, nn.Linear | Conv1D)).values())


def _with_biases(base: Any, places: dict[str, Tensor]) -> Any:
    """The configuration with which these maps have biases: the model's own, or the same with one more switch set.

    Raises:
        ExportError: no switch adds them.
    """
    switches = [k for k, v in base.config.to_dict().items() if k.endswith("bias") and v is False]
    for switch in [None, *switches]:
        config = copy.deepcopy(base.config)
        if switch is not None:
            setattr(config, switch, True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        if all(getattr(model.get_submodule(name), "bias", None) is not None for name in places):
            return config
    raise ExportError(
        f"{type(base).__name__} has no bias at {sorted(places)}, and its configuration has no switch for it "
        f"({switches}): an added bias would be dropped when the model is loaded again. What works: peft, safetensors."
    )


TARGET = MergedExport()
