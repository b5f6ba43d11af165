"""Resuming an adapter that was trained beside its frozen reference copy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import TrainerCallback

from ._at import REFERENCE_ADAPTER

if TYPE_CHECKING:
    from ._mixin import SteeringMixin


class RestoredAdapter(TrainerCallback):
    """Loads the trained adapter of a checkpoint that holds several.

    The trained one lies in the checkpoint itself, the reference in a folder of it. transformers 5.17 loads only what
    lies in folders, so training would start again from the beginning without a word; later versions load both.
    """

    def __init__(self, trainer: SteeringMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer event: everything is loaded, no step is taken."""
        model, folder = self.trainer.accelerator.unwrap_model(self.trainer.model), self.trainer.resumed
        if folder is None or not isinstance(model, PeftModel) or REFERENCE_ADAPTER not in model.peft_config:
            return
        if (Path(folder) / SAFETENSORS_WEIGHTS_NAME).is_file():
            model.load_adapter(folder, str(model.active_adapter), is_trainable=True)
