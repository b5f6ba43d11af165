"""Models with an adapter of any PEFT method, and the base model of saved work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME

import steertune.adapters  # noqa: F401  registers the method with PEFT
from steertune.recipes.lab import embedded
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.tables import ModelTable


def base_table(made_for: str, given: str | None = None, dtype: Any = "float32") -> ModelTable:
    """The table of the base model: `given`, or else the one that the adapter was made for."""
    return ModelTable(name=embedded.local_name(given or made_for), dtype=dtype)


def adapted(model: Any, folder: Path | None) -> Any:
    """Load an adapter onto a model, in evaluation mode; without a folder, return the model itself.

    Raises:
        ArmError: the folder has no safetensors adapter, or one for a different base model.
    """
    if folder is None:
        return model
    if not (folder / "adapter_config.json").is_file() or not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ArmError(
            f"{folder} is not an adapter folder: it needs adapter_config.json and {SAFETENSORS_WEIGHTS_NAME}."
        )
    try:
        return PeftModel.from_pretrained(model, str(folder)).eval()
    except (ValueError, TypeError, RuntimeError) as error:
        raise ArmError(f"{folder} cannot be loaded: {error}") from error
