"""A plug-in for axolotl (0.21): steering vectors as `adapter: steering_vector` in its YAML.

    plugins:
      - steertune.recipes.axolotl_plugin.SteeringVectorPlugin
    adapter: steering_vector
    steering_vector:
      layers: 0.5
      norm: free
    learning_rate: 5e-4

The table takes the fields of `SteeringVectorConfig`. Training, data and losses (also `rl: dpo`, `ipo`, `kto`) are
axolotl's; `lora_model_dir:` continues a saved vector. An `init` that is computed from data is refused, because axolotl
has no hook to compute it before training.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin  # pyright: ignore[reportMissingImports]
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel
from transformers import set_seed

from steertune.adapters import SteeringVectorConfig
from steertune.recipes.lab.arm import check_keys
from steertune.recipes.lab.files import ArmError

NAME = "steering_vector"
_OWN = {field.name for field in dataclasses.fields(SteeringVectorConfig)}
_INHERITED = {field.name for field in dataclasses.fields(PeftConfig)} | {"base_fingerprint", "checksum"}


class SteeringVectorArgs(BaseModel):
    """The keys that this plug-in adds to the YAML."""

    steering_vector: dict[str, Any] | None = None


class SteeringVectorPlugin(BasePlugin):
    """The methods that axolotl calls; see its `BasePlugin`."""

    def get_input_args(self) -> str:
        """Import path of the class with our keys."""
        return f"{SteeringVectorArgs.__module__}.{SteeringVectorArgs.__qualname__}"

    def get_adapter_capabilities(self) -> list[Any]:
        """The name in `adapter:`."""
        return [AdapterCapabilities(name=NAME)]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, PeftConfig] | None:
        """The model with a vector, and the configuration of the vector; None if the YAML names another adapter.

        Raises:
            ArmError: an unknown key, or an `init` that needs data.
            ValueError: a value out of range.
        """
        if cfg.adapter != NAME:
            return None
        config = peft_config(dict(cfg.steering_vector or {}))
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference), config
        if cfg.seed is not None:
            set_seed(cfg.seed)
        return get_peft_model(model, config), config


def peft_config(table: dict[str, Any]) -> SteeringVectorConfig:
    """The configuration from the YAML's table.

    Raises:
        ArmError: an unknown key, or an `init` that needs data.
        ValueError: a value out of range.
    """
    check_keys(NAME, table, sorted(_OWN - _INHERITED))
    config = SteeringVectorConfig(**table)
    if config.init_from_data:
        raise ArmError(
            f"init={config.init!r} is computed from pairs before training, but axolotl has no hook for that. Use "
            "zeros or random, or save a vector with the direction first (directions.compute) and name its folder in "
            "lora_model_dir."
        )
    return config
