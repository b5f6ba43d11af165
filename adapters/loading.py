"""Check adapters that transformers loads without their own configuration class."""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel

from .config import SteeringVectorConfig
from .saved import check_adapter_folder, local_folder, undeclared


def check_what_transformers_loads() -> None:
    """Make transformers' `model.load_adapter` check an adapter as `PeftModel.from_pretrained` does.

    Otherwise it bypasses `SteeringVectorConfig.from_pretrained`, and loads every tensor of the file into the model,
    even if that overwrites weights of the base.
    """
    load = PreTrainedModel.load_adapter
    signature = inspect.signature(load)

    @functools.wraps(load)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        options = {"local_files_only": given.get("local_files_only", False), **(given.get("adapter_kwargs") or {})}
        if given.get("peft_model_id") is not None:
            _check_folder(given["peft_model_id"], given.get("peft_config"), options)
        elif isinstance(given.get("peft_config"), SteeringVectorConfig):
            _check_names(given.get("adapter_state_dict") or {}, given["peft_config"])
        return load(self, *args, **kwargs)

    PreTrainedModel.load_adapter = load_adapter


def _check_folder(name: str, config: Any, options: dict[str, Any]) -> None:
    """Check the folder of a steering vector; errors of other adapters are left to transformers."""
    folder = local_folder(name, **options)
    if not os.path.lexists(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)):
        return  # transformers reads no pickle either, and names the missing file
    try:
        loaded = PeftConfig.from_pretrained(name, **options) if config is None else config
    except (ValueError, OSError, KeyError):
        return
    if isinstance(loaded, SteeringVectorConfig):
        check_adapter_folder(folder, loaded)


def _check_names(tensors: dict[str, Any], config: SteeringVectorConfig) -> None:
    for name in undeclared(tensors, config):
        raise ValueError(
            f"adapter_state_dict: {name!r} is not a steering vector, and modules_to_save={config.modules_to_save} "
            "does not name it. It would overwrite the base model: remove it."
        )
