"""What every recipe that trains shares: the trainer of an arm, resuming, whole files."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from pydantic import BaseModel
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from steertune.recipes.lab.arm import Arm
from steertune.recipes.lab.files import ArmError, read_text, write_whole
from steertune.recipes.lab.generation import plain
from steertune.recipes.lab.ingredients import Training
from steertune.recipes.lab.observe import FEW_NEUTRAL, HeldOut, neutral_rows
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import Bar
from steertune.trainers import FrozenPrefix, last_checkpoint, share_weights

QUIET: dict[str, Any] = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
"""Settings of a short training that keeps no checkpoints and prints nothing; they do not change what is learned."""


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


def open_run(arm: Arm, prefix: str = "", threads: int | None = None) -> Path:
    """Begin a run of an arm, or go on with it: set the threads and the seed, and take its output folder.

    Args:
        arm: The arm.
        prefix: In front of the folder's default name.
        threads: CPU threads; None: the arm's.

    Raises:
        ArmError: the folder holds a finished run, or one of another arm.
    """
    begin(threads or arm.model.threads)
    folder = Path(arm.output.folder) if arm.output.folder else default_folder(f"{prefix}{arm.name}", arm.data.name)
    claim(folder, arm, PartialState().is_main_process)
    set_seed(arm.data.seed)
    return folder


def default_folder(name: str, task: str) -> Path:
    """Where a run on a task is kept if nobody says."""
    return Path("runs") / f"{name}-{task.strip('./').replace('/', '-')}"


def held_out_of(arm: Arm, model: Any, tokenizer: Any, test: Dataset, **more: Any) -> HeldOut:
    """The examples that an arm is measured on, as its `[evaluation]` says; `more` sets further fields."""
    table = arm.evaluation
    return HeldOut(
        model,
        tokenizer,
        pairs=test,
        neutral=neutral_rows(count=FEW_NEUTRAL),
        generations=table.generations,
        new_tokens=table.new_tokens,
        batch_size=table.batch_size,
        **more,
    )


def facts_of(training: Training, held_out: HeldOut) -> dict[str, Any]:
    """What a record says of a training and of what it was measured on."""
    arm = training.arm
    return {
        "adapter": arm.adapter,
        "loss": arm.loss,
        "model": arm.model.name,
        "notes": training.notes,
        "prompts": [plain(prompt) for prompt in held_out.prompts],
    }


def training_of(arm: Arm, model: Any, tokenizer: Any, rows: Dataset, folder: Path, **context: Any) -> Training:
    """A training of an arm on some rows; `context` sets further fields of `Training`."""

    def train(name: str, changes: Mapping[str, Any], examples: Dataset) -> Any:
        """Train a teacher beside the base's own weights, with cross-entropy."""
        own = arm.model_copy(
            update={
                "name": f"{arm.name}/{name}",
                "adapter": changes["adapter"],
                "loss": {"name": "cross_entropy"},
                "trainer": {**arm.trainer, **changes["trainer"]},
                "ingredients": {},
            }
        )
        home = folder / "teachers" / name
        home.mkdir(parents=True, exist_ok=True)
        quiet = {key: value for key, value in training.options.get("settings", {}).items() if key in QUIET}
        trainer = make_trainer(training_of(own, share_weights(model), tokenizer, examples, home), **quiet)
        fit(trainer, home)
        return trainer.model.eval().requires_grad_(False)

    training = Training(arm, model, tokenizer, rows, folder, arm.data.seed, train, **context)
    return training


def make_trainer(training: Training, frozen_prefix: FrozenPrefix | bool | None = None, **settings: Any) -> Any:
    """The trainer of a training: `SteeringDPOTrainer` for pairs, `SteeringSFTTrainer` for demonstrations.

    Args:
        training: What is trained, on which rows; the adapter is put on its model, full finetuning changes it.
        frozen_prefix: The trainer's.
        settings: Training arguments that take precedence over the arm's own, which its teachers inherit.
    """
    from trl import DPOConfig, SFTConfig

    from steertune.trainers import SteeringDPOTrainer, SteeringSFTTrainer

    arm, folder = training.arm, training.folder
    # the ingredients change the rows, train teachers, and add arguments of the trainer
    training.options["settings"] = settings
    for ingredient in arm.ordered_ingredients():
        ingredient.apply(training)
    options = {name: value for name, value in training.options.items() if name != "settings"}

    pairs = "chosen" in training.rows.column_names
    trainer_class, config_class = (SteeringDPOTrainer, DPOConfig) if pairs else (SteeringSFTTrainer, SFTConfig)
    defaults = {
        "seed": arm.data.seed,
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 5,
        "disable_tqdm": True,  # the command has a bar of its own
        "use_cpu": not torch.cuda.is_available(),
    }
    with_settings = arm.model_copy(update={"trainer": {**arm.trainer, **settings}})
    config = arm.peft_config()
    if pairs and config is None:  # full finetuning changes the base, so the reference is a copy
        options["ref_model"] = copy.deepcopy(training.model)
    trainer = trainer_class(
        model=training.model,
        args=with_settings.training_arguments(config_class, str(folder / "checkpoints"), **defaults),
        train_dataset=training.rows,
        processing_class=training.tokenizer,
        peft_config=config,
        loss=arm.loss_object(),
        frozen_prefix=frozen_prefix,
        **options,
    )
    trainer.add_callback(_MetricsFile(folder / "metrics.jsonl"))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Steps())
    return trainer


def fit(trainer: Any, folder: Path) -> float:
    """Train, from the last whole checkpoint if there is one; with `max_steps = 0` only set the initial vector.

    Returns:
        Seconds.
    """
    start = time.monotonic()
    if trainer.args.max_steps == 0:
        trainer.initialise_vectors()
    else:
        trainer.train(resume_from_checkpoint=last_checkpoint(folder / "checkpoints"))
    return time.monotonic() - start


def silent(trainer: Any) -> Any:
    """The trainer without printed logs and progress bar: one of many short trainings, which share a bar."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


class _Steps(TrainerCallback):
    """Moves the command's bar with every step, and shows the loss beside the name of what is trained."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer event: training starts, or continues after the steps of an earlier run."""
        self.bar = Bar(state.max_steps)
        self.bar.skip(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer event: the optimiser made a step."""
        self.bar.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Trainer event: something was logged."""
        if "loss" in (logs or {}):
            self.bar.note(f"loss {float(logs['loss']):.3g}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer event: training has ended."""
        self.bar.note("")


class _MetricsFile(TrainerCallback):
    """Keeps `metrics.jsonl`: one line per logged step, whole after every log and right after a resume."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer event: something was logged."""
        if state.is_world_process_zero:
            write_whole(self.file, "".join(json.dumps(line) + "\n" for line in state.log_history))
