"""What every recipe that trains shares: the trainer of an arm, resuming, whole files."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from pydantic import BaseModel
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from steertune.recipes.lab.arm import Arm, ArmError
from steertune.recipes.lab.files import read_text, write_whole
from steertune.recipes.lab.teachers import train_teachers
from steertune.trainers import FrozenPrefix, last_checkpoint

_QUIET = ("save_strategy", "logging_strategy", "disable_tqdm")  # settings that say nothing about learning


def claim(folder: Path, tables: BaseModel, main_process: bool) -> None:
    """Take a folder for a run of an arm (or of other tables), or go on in it.

    Raises:
        ArmError: it holds a finished run, or one of another arm.
    """
    config = tables.model_dump_json(indent=2)
    file = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise ArmError(f"{folder} is a file. Choose another output folder.")
    if (folder / "result.json").exists():
        raise ArmError(f"{folder} holds a finished run ({folder / 'page.md'}). Choose another output folder.")
    if file.exists() and read_text(file, "JSON") != config:
        raise ArmError(f"{folder} holds an unfinished run of another arm. Choose another output folder, or delete it.")
    if main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, config)


def make_trainer(
    arm: Arm,
    model: Any,
    tokenizer: Any,
    train: Dataset,
    folder: Path,
    frozen_prefix: FrozenPrefix | bool | None = None,
    **settings: Any,
) -> Any:
    """The arm's trainer: `SteeringDPOTrainer` for pairs, `SteeringSFTTrainer` for demonstrations.

    Args:
        arm: What is trained and how.
        model: The base model; the adapter is put on it, full finetuning changes it.
        tokenizer: Its tokenizer.
        train: Training examples.
        folder: For checkpoints and `metrics.jsonl`.
        frozen_prefix: The trainer's.
        settings: Training arguments that go before the arm's own, which are its teachers'.
    """
    from trl import DPOConfig, SFTConfig

    from steertune.trainers import SteeringDPOTrainer, SteeringSFTTrainer

    pairs = "chosen" in train.column_names
    trainer_class, config_class = (SteeringDPOTrainer, DPOConfig) if pairs else (SteeringSFTTrainer, SFTConfig)
    defaults = {
        "seed": arm.data.seed,
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 5,
        "use_cpu": not torch.cuda.is_available(),
    }
    tried = arm.model_copy(update={"trainer": {**arm.trainer, **settings}})
    arguments = tried.training_arguments(config_class, str(folder / "checkpoints"), **defaults)
    loss, config = arm.loss_object(), arm.peft_config()
    asked = arm.views_seen()  # an override or a level may have put another loss in the place of one that saw more
    quiet = {name: settings[name] for name in _QUIET if name in settings}
    teachers = train_teachers(arm, model, tokenizer, train, folder, quiet)
    unchanged = {}
    if pairs and config is None:  # full finetuning changes the base, so the reference is a copy
        unchanged["ref_model"] = copy.deepcopy(model)
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=config,
        loss=loss,
        frozen_prefix=frozen_prefix,
        views={name: view for name, view in arm.view_objects(teachers).items() if name in asked},
        inductive_biases=arm.biases,
        **unchanged,
    )
    trainer.add_callback(_MetricsFile(folder / "metrics.jsonl"))
    return trainer


def fit(trainer: Any, folder: Path) -> float:
    """Train, from the last whole checkpoint if any; with `max_steps = 0` only set the initial vector. Seconds."""
    start = time.monotonic()
    if trainer.args.max_steps == 0:
        trainer.initialise_vectors()
    else:
        trainer.train(resume_from_checkpoint=last_checkpoint(folder / "checkpoints"))
    return time.monotonic() - start


def silent(trainer: Any) -> Any:
    """The trainer, without printed logs and without a bar: one of many short trainings, which have a bar together."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


class _MetricsFile(TrainerCallback):
    """Keeps `metrics.jsonl`: one line per logged step, whole after every log and right after a resume."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer event: something was logged."""
        if state.is_world_process_zero:
            write_whole(self.file, "".join(json.dumps(line) + "\n" for line in state.log_history))
