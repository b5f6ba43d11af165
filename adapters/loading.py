"""Check what transformers loads without asking the adapter's own configuration class."""

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
    """Let transformers' `model.load_adapter` check an adapter as `PeftModel.from_pretrained` does.

    It reads the configuration past `SteeringVectorConfig.from_pretrained`, and loads every tensor of the file into the
    model, over the base's among them.
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
    """Check the folder of a steering vector; of anything else, transformers says what is wrong."""
    folder = local_folder(name, **options)
    if not os.path.lexists(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)):
        return  # it reads no pickle either, and says which file is missing
    try:
        found = PeftConfig.from_pretrained(name, **options) if config is None else config
    except (ValueError, OSError, KeyError):
        return
    if isinstance(found, SteeringVectorConfig):
        check_adapter_folder(folder, found)


def _check_names(tensors: dict[str, Any], config: SteeringVectorConfig) -> None:
    for name in undeclared(tensors, config):
        raise ValueError(
            f"adapter_state_dict: {name!r} is no steering vector, and modules_to_save={config.modules_to_save} does "
            "not name it: it would overwrite the base model. Take it out."
        )
