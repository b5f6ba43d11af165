"""Check a checkpoint before training resumes from it, and write checksums into new ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...adapters.saved import write_checksums
from ..checkpoints import (
    CheckpointError,
    adapter_folder,
    check_adapter_in,
    check_checkpoint,
    check_processes,
    check_state,
    last_checkpoint,
)
from ..model_at import REFERENCE_ADAPTER
from ..rates import take_units_of
from ..types import SteeringRun


class Checkpoints(TrainerCallback):
    """Checks the checkpoint that training resumes from, loads all of it, and writes checksums into new ones.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: SteeringRun) -> None:
        self.trainer = trainer
        self.resumed: str | None = None  # the checkpoint from which training continues

    def resume_from(self, checkpoint: str | os.PathLike[str] | bool | None) -> str | None:
        """Check the checkpoint to resume training from; True stands for the newest complete one.

        Returns:
            Its folder; None if training starts from the beginning.

        Raises:
            CheckpointError: it is missing, incomplete, or from another training run.
        """
        self.resumed = None
        if checkpoint is None or checkpoint is False or checkpoint == "":
            return None
        trainer, output = self.trainer, str(self.trainer.args.output_dir)
        folder = last_checkpoint(output) if checkpoint is True else os.fspath(checkpoint)
        if folder is None:
            raise CheckpointError(f"{output} has no complete checkpoint. Leave resume_from_checkpoint out.")
        check_checkpoint(folder)
        check_processes(folder, trainer.accelerator.num_processes, trainer.is_deepspeed_enabled)
        check_state(folder, trainer)
        check_adapter_in(folder, trainer.model)
        take_units_of(folder, trainer.model)
        self.resumed = folder
        return folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the trained adapter of a checkpoint that also holds a reference.

        The trained adapter is in the checkpoint itself, the reference in a subfolder. transformers 5.17 loads only
        subfolders, so training would silently start again from the beginning; later versions load both.
        """
        model, folder = self.trainer.accelerator.unwrap_model(self.trainer.model), self.resumed
        if folder is None or not isinstance(model, PeftModel) or REFERENCE_ADAPTER not in model.peft_config:
            return
        home = adapter_folder(model, Path(folder))
        if (home / SAFETENSORS_WEIGHTS_NAME).is_file():
            model.load_adapter(str(home), str(model.active_adapter), is_trainable=True)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the checksums of weights and JSON into a checkpoint that was just finished."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_checksums(folder)
