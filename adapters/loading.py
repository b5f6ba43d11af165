"""Check what transformers loads without asking the adapter's own configuration class."""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftConfig
from transformers import PreTrainedModel

from .checks import undeclared
from .config import SteeringVectorConfig


def check_what_transformers_loads() -> None:
    """Let transformers' `model.load_adapter` check an adapter's folder as `PeftModel.from_pretrained` does.

    It reads the configuration past `SteeringVectorConfig.from_pretrained`, and loads every tensor of the file into the model,
    the base's among them.
    """
    load = PreTrainedModel.load_adapter

    @functools.wraps(load)
    def load_adapter(self: Any, peft_model_id: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if peft_model_id is not None:
            options = {"local_files_only": kwargs.get("local_files_only", False), **(kwargs.get("adapter_kwargs") or {})}
            try:
                config = PeftConfig.from_pretrained(peft_model_id, **options)
            except (ValueError, OSError, KeyError):
                config = None  # transformers says what is wrong
            if isinstance(config, SteeringVectorConfig):
                SteeringVectorConfig.from_pretrained(peft_model_id, **options)
        given = kwargs.get("peft_config")
        if isinstance(given, SteeringVectorConfig) and (names := undeclared(kwargs.get("adapter_state_dict") or {}, given)):
            raise ValueError(
                f"adapter_state_dict holds {names[0]!r}, which is no steering vector and not in modules_to_save="
                f"{given.modules_to_save}: it would overwrite the base model. Take it out."
            )
        return load(self, peft_model_id, *args, **kwargs)

    PreTrainedModel.load_adapter = load_adapter
