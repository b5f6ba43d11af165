"""Training code that recipes share: the trainer of an arm, resuming, output folders."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from datasets import Dataset
from pydantic import BaseModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from steertune.recipes.lab import trained_on
from steertune.recipes.lab.arm import Arm
from steertune.recipes.lab.data import Data
from steertune.recipes.lab.files import ArmError, check_place, read_text, write_whole
from steertune.recipes.lab.generation import LONGEST, longest_vector, plain
from steertune.recipes.lab.ingredients import Training
from steertune.recipes.lab.observe import FEW_NEUTRAL, HeldOut, neutral_rows, prompts_in
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import Bar, say
from steertune.recipes.lab.reading import BUILDERS
from steertune.trainers import FrozenPrefix, last_checkpoint, share_weights

QUIET: dict[str, Any] = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
"""Settings of a short training without checkpoints and logs; they do not change what is learned."""
_LONGEST = 60  # characters of a default folder's name, at most 4 bytes each
_SAMPLED = 4096


Asked = Literal["held-out", "training", "neutral"]
"""The prompts that are answered."""

_WORTHLESS = {"config.json", "metrics.jsonl"}
"""Files of a run that cannot be continued."""


def check_unfinished(folder: Path) -> None:
    """Refuse a folder that holds a finished run.

    Raises:
        ArmError: the folder holds a finished run, is a file, or cannot be created.
    """
    if folder.exists() and not folder.is_dir():
        raise ArmError(f"{folder} is a file. Choose another output folder.")
    if (folder / "result.json").exists():
        raise ArmError(
            f"{folder} holds a finished run ({folder / 'page.md'}). Choose another output folder, or delete it."
        )
    check_place(folder)


def check_folder(folder: Path, tables: BaseModel) -> None:
    """Refuse a folder that a run of an arm (or of other tables) cannot use. Nothing is written.

    Raises:
        ArmError: it holds a finished run, or an unfinished run of another arm with a checkpoint.
    """
    check_unfinished(folder)
    config = tables.model_dump_json(indent=2)
    file = folder / "config.json"
    if file.exists() and read_text(file, "JSON") != config and not _is_worthless(folder):
        raise ArmError(f"{folder} holds an unfinished run of another arm. Choose another output folder, or delete it.")


def claim(folder: Path, tables: BaseModel, main_process: bool = True) -> None:
    """Take a folder for a run, or continue in it.

    Raises:
        ArmError: see `check_folder`.
    """
    check_folder(folder, tables)
    if main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.json", tables.model_dump_json(indent=2))


@contextmanager
def claimed(folder: Path, tables: BaseModel, main_process: bool = True) -> Iterator[None]:
    """Take a folder for the run inside, or continue in it.

    A run that fails before its first checkpoint leaves no folder, so that the corrected command can use it.
    """
    claim(folder, tables, main_process)
    try:
        yield
    except BaseException:
        if main_process and folder.is_dir() and _is_worthless(folder):
            shutil.rmtree(folder)
        raise


def _is_worthless(folder: Path) -> bool:
    """Whether a folder contains only the configuration and the log of a run."""
    return {file.name for file in folder.rglob("*") if not file.is_dir()} <= _WORTHLESS


def open_run(arm: Arm, prefix: str = "", threads: int | None = None) -> Path:
    """Begin or continue a run of an arm: set the threads and the seed, and check its output folder. `prefix` is put
    before the folder's default name.

    Raises:
        ArmError: the folder holds a finished run, or one of another arm.
    """
    begin(threads or arm.model.threads)
    folder = Path(arm.output.folder) if arm.output.folder else default_folder(f"{prefix}{arm.name}", arm.data.name)
    check_folder(folder, arm)
    set_seed(arm.data.seed)
    return folder


def default_folder(name: str, task: str) -> Path:
    """The default folder of a run on a task."""
    suffix = Path(task).suffix
    name = f"{name}-{task.removesuffix(suffix if suffix in BUILDERS else '').strip('./').replace('/', '-')}"
    if len(name) > _LONGEST:  # file systems take 255 bytes
        name = f"{name[:_LONGEST]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
    return Path("runs") / name


def held_out_of(arm: Arm, model: Any, tokenizer: Any, test: Dataset, **more: Any) -> HeldOut:
    """The examples that an arm is measured on, according to its `[evaluation]`; `more` sets further fields."""
    table = arm.evaluation
    return HeldOut(
        model,
        tokenizer,
        pairs=test,
        neutral=neutral_rows(tokenizer, count=FEW_NEUTRAL),
        generations=table.generations,
        neutral_generations=table.generations,
        new_tokens=table.new_tokens,
        batch_size=table.batch_size,
        **more,
    )


def prompts_to_answer(train: Dataset, test: Dataset, neutral: Dataset) -> tuple[Asked, Dataset]:
    """The prompts on which to show the effect of training: held-out ones, else training prompts, else those of neutral
    text.

    Returns:
        The kind of the prompts, and rows with a column `prompt`.
    """
    if prompts_in(test):
        return "held-out", test.select_columns(["prompt"])
    if prompts_in(train):
        return "training", train.select_columns(["prompt"])
    return "neutral", neutral.select_columns(["prompt"])


def facts_of(training: Training, held_out: HeldOut) -> dict[str, Any]:
    """The facts of a record about a training and its evaluation."""
    arm = training.arm
    return {
        "adapter": arm.adapter,
        "loss": arm.loss,
        "model": arm.model.name,
        "notes": training.notes,
        "prompts": [plain(prompt) for prompt in held_out.prompts],
    }


def training_of(arm: Arm, model: Any, tokenizer: Any, rows: Dataset, folder: Path, **context: Any) -> Training:
    """The training of an arm on some rows; `context` sets further fields of `Training`."""

    def train(name: str, changes: Mapping[str, Any], examples: Dataset) -> Any:
        """Train a teacher with cross-entropy; it shares the base model's weights."""
        teacher = arm.model_copy(
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
        trainer = make_trainer(training_of(teacher, share_weights(model), tokenizer, examples, home), **quiet)
        fit(trainer, home)
        return trainer.model.eval().requires_grad_(False)

    training = Training(arm, model, tokenizer, rows, folder, arm.data.seed, train, **context)
    return training


def make_trainer(training: Training, frozen_prefix: FrozenPrefix | bool | None = None, **settings: Any) -> Any:
    """The trainer of a training: `SteeringDPOTrainer` for pairs, `SteeringSFTTrainer` for demonstrations.

    Args:
        training: The arm, its model and rows. The adapter is added to this model; full finetuning changes it.
        frozen_prefix: Argument of the trainer.
        settings: Training arguments that take precedence over those of the arm. Teachers inherit them.
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
        "disable_tqdm": True,  # the command has its own bar
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


def train_and_save(training: Training, data: Data) -> tuple[Any, Any, float]:
    """Train, and save the adapter in the training's folder, with hashes of its training rows.

    Returns:
        The trainer, its model in evaluation mode, and the seconds of training.
    """
    trainer, home = make_trainer(training), training.folder / "adapter"
    is_first = PartialState().is_main_process
    if training.notes and is_first:
        print("\n".join(training.notes.values()))
    seconds = fit(trainer, training.folder)
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):  # these shard the vector
        _check_length(trainer.model, training.folder)
    trainer.save_model(str(home))  # in every process: sharded weights are gathered, and the first process writes
    if is_first:
        trained_on.write(home, trained_on.sets_of(data.train, data.by, training.rows))
    return trainer, trainer.accelerator.unwrap_model(trainer.model).eval(), seconds


def _check_length(model: Any, folder: Path) -> None:
    """Refuse to save a trained vector that is too long for the model's number format.

    Raises:
        ArmError: the message names its length.
    """
    length = longest_vector(model)
    if not length <= LONGEST:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # nothing to continue from
        raise ArmError(
            f"The trained vector has a length of {length:.2g}, which is more than the model can add: the training has "
            "diverged. Lower trainer.learning_rate."
        )


def steps_of(arm: Arm) -> int:
    """Number of optimiser steps of an arm with one process."""
    table = arm.trainer
    if table.get("max_steps", -1) >= 0:
        return int(table["max_steps"])
    rows = table.get("per_device_train_batch_size", 8) * table.get("gradient_accumulation_steps", 1)
    return math.ceil(math.ceil(arm.data.train / rows) * table.get("num_train_epochs", 3.0))


def fit(trainer: Any, folder: Path) -> float:
    """Train, from the last whole checkpoint if there is one; with `max_steps = 0` only set the initial vector.

    Returns:
        Seconds.

    Raises:
        NothingLearned: no step was taken, or no trained parameter changed.
    """
    start = time.monotonic()
    if trainer.args.max_steps == 0:
        trainer.initialise_vectors()
    else:
        trainer.add_callback(_Moved())
        checkpoint = last_checkpoint(folder / "checkpoints")
        if checkpoint is not None:
            say(f"Training continues from {checkpoint}, which an interrupted run left.")
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except NothingLearned:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # nothing to continue from
            raise
    return time.monotonic() - start


def silent(trainer: Any) -> Any:
    """Remove printed logs and the progress bar from a trainer, for many short trainings that share a bar."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


class _Steps(TrainerCallback):
    """Moves the command's bar with every step, and shows the loss beside the name of what is trained."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = Bar(state.max_steps)
        self.bar.skip(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.bar.note(f"loss {float(logs['loss']):.3g}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.note("")


class NothingLearned(ArmError):
    """Training changed nothing."""


class _Moved(TrainerCallback):
    """Raises an error if training took no step or changed nothing: the adapter would silently do nothing."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.step, self.before = state.global_step, _sample(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            raise NothingLearned(
                "Training ended after 0 steps: there are fewer rows than one step needs. Give more rows, a smaller "
                "trainer.per_device_train_batch_size, or set trainer.max_steps."
            )
        same = map(torch.equal, self.before, _sample(model))
        if self.before and state.global_step > self.step and all(same):
            raise NothingLearned(
                f"{state.global_step - self.step} steps changed no trained parameter. Is trainer.learning_rate="
                f"{args.learning_rate:g} too small, or does the loss have no gradient?"
            )


def _sample(model: Any) -> list[Tensor]:
    """Copies of some values of every trained parameter, or all values of small ones, without those of other
    processes."""
    trained = [p.detach() for p in model.parameters() if p.requires_grad and p.numel() and not isinstance(p, DTensor)]
    return [p.flatten()[:: max(1, p.numel() // _SAMPLED)].clone() for p in trained]


class _MetricsFile(TrainerCallback):
    """Writes `metrics.jsonl`: one line per logged step, complete after every log and correct after resuming."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_whole(self.file, "".join(json.dumps(line) + "\n" for line in state.log_history))
