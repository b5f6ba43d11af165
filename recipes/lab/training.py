"""What every recipe that trains shares: the trainer of an arm, resuming, whole files."""

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
from steertune.recipes.lab.progress import Bar
from steertune.recipes.lab.reading import BUILDERS
from steertune.trainers import FrozenPrefix, last_checkpoint, share_weights

QUIET: dict[str, Any] = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
"""Settings of a short training that keeps no checkpoints and prints nothing; they do not change what is learned."""
_LONGEST = 60  # characters of a default folder's name, each of which takes 4 bytes at most
_SAMPLED = 4096


Asked = Literal["held-out", "training", "neutral"]
"""Which prompts are answered."""

_WORTHLESS = {"config.json", "metrics.jsonl"}
"""Files of a run that has nothing to continue from."""


def check_unfinished(folder: Path) -> None:
    """Refuse a folder that holds a finished run.

    Raises:
        ArmError: it does, it is a file, or it cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise ArmError(f"{folder} is a file. Choose another output folder.")
    if (folder / "result.json").exists():
        raise ArmError(
            f"{folder} holds a finished run ({folder / 'page.md'}). Choose another output folder, or delete it."
        )
    check_place(folder)


def check_folder(folder: Path, tables: BaseModel) -> None:
    """Refuse a folder that a run of an arm (or of other tables) cannot have. Nothing is written.

    Raises:
        ArmError: it holds a finished run, or one of another arm that got as far as a checkpoint.
    """
    check_unfinished(folder)
    config = tables.model_dump_json(indent=2)
    file = folder / "config.json"
    if file.exists() and read_text(file, "JSON") != config and not _is_worthless(folder):
        raise ArmError(f"{folder} holds an unfinished run of another arm. Choose another output folder, or delete it.")


def claim(folder: Path, tables: BaseModel, main_process: bool = True) -> None:
    """Take a folder for a run, or continue in it.

    Raises:
        ArmError: as `check_folder`.
    """
    check_folder(folder, tables)
    if main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.json", tables.model_dump_json(indent=2))


@contextmanager
def claimed(folder: Path, tables: BaseModel, main_process: bool = True) -> Iterator[None]:
    """Take a folder for the run inside, or continue in it.

    A run that fails before its first checkpoint leaves no folder, so that the corrected command can have it.
    """
    claim(folder, tables, main_process)
    try:
        yield
    except BaseException:
        if main_process and folder.is_dir() and _is_worthless(folder):
            shutil.rmtree(folder)
        raise


def _is_worthless(folder: Path) -> bool:
    """Whether a folder holds nothing of a run but its configuration and its log."""
    return {file.name for file in folder.rglob("*") if not file.is_dir()} <= _WORTHLESS


def open_run(arm: Arm, prefix: str = "", threads: int | None = None) -> Path:
    """Begin a run of an arm, or continue it: set the threads and the seed, and check its output folder. `prefix` is
    put before the folder's default name.

    Raises:
        ArmError: the folder holds a finished run, or one of another arm.
    """
    begin(threads or arm.model.threads)
    folder = Path(arm.output.folder) if arm.output.folder else default_folder(f"{prefix}{arm.name}", arm.data.name)
    check_folder(folder, arm)
    set_seed(arm.data.seed)
    return folder


def default_folder(name: str, task: str) -> Path:
    """Where a run on a task is kept by default."""
    suffix = Path(task).suffix
    name = f"{name}-{task.removesuffix(suffix if suffix in BUILDERS else '').strip('./').replace('/', '-')}"
    if len(name) > _LONGEST:  # file systems take 255 bytes
        name = f"{name[:_LONGEST]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
    return Path("runs") / name


def held_out_of(arm: Arm, model: Any, tokenizer: Any, test: Dataset, **more: Any) -> HeldOut:
    """The examples that an arm is measured on, as its `[evaluation]` says; `more` sets further fields."""
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
    """The prompts that show what a training did to answers: held-out ones, where there are none training prompts,
    and where no row has a prompt those of neutral text.

    Returns:
        Which prompts they are, and rows with a column `prompt`.
    """
    if prompts_in(test):
        return "held-out", test.select_columns(["prompt"])
    if prompts_in(train):
        return "training", train.select_columns(["prompt"])
    return "neutral", neutral.select_columns(["prompt"])


def facts_of(training: Training, held_out: HeldOut) -> dict[str, Any]:
    """The facts of a record about a training and what it was measured on."""
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


def train_and_save(training: Training, data: Data) -> tuple[Any, Any, float]:
    """Train, and save the adapter in the training's folder, with hashes of the rows that it learned from.

    Returns:
        The trainer, its model in evaluation mode, and the seconds of training.
    """
    trainer, home = make_trainer(training), training.folder / "adapter"
    is_first = PartialState().is_main_process
    if training.notes and is_first:
        print("\n".join(training.notes.values()))
    seconds = fit(trainer, training.folder)
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):  # which hold parts of a vector
        _check_length(trainer.model, training.folder)
    trainer.save_model(str(home))  # every process: sharded weights are gathered, the first one writes
    if is_first:
        trained_on.write(home, trained_on.sets_of(data.train, data.by, training.rows))
    return trainer, trainer.accelerator.unwrap_model(trainer.model).eval(), seconds


def _check_length(model: Any, folder: Path) -> None:
    """Refuse a trained vector that is longer than the model's numbers can hold: it is no result, and not saved.

    Raises:
        ArmError: names its length.
    """
    length = longest_vector(model)
    if not length <= LONGEST:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # nothing to go on from
        raise ArmError(
            f"The trained vector has a length of {length:.2g}, which is more than the model can add: the training has "
            "diverged. Lower trainer.learning_rate."
        )


def steps_of(arm: Arm) -> int:
    """Optimiser steps that an arm asks for, of one process."""
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
        NothingLearned: no step was made, or no trained parameter moved.
    """
    start = time.monotonic()
    if trainer.args.max_steps == 0:
        trainer.initialise_vectors()
    else:
        trainer.add_callback(_Moved())
        try:
            trainer.train(resume_from_checkpoint=last_checkpoint(folder / "checkpoints"))
        except NothingLearned:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # nothing to continue from
            raise
    return time.monotonic() - start


def silent(trainer: Any) -> Any:
    """The trainer without printed logs and progress bar: one of many short trainings, which share a bar."""
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
    """A training ended as it began."""


class _Moved(TrainerCallback):
    """Ends a training that made no step, or changed nothing: its adapter would silently do nothing."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.step, self.before = state.global_step, _sample(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            raise NothingLearned(
                "Training ended after 0 steps: there are fewer rows than a step takes. Give more rows, a smaller "
                "trainer.per_device_train_batch_size, or set trainer.max_steps."
            )
        same = map(torch.equal, self.before, _sample(model))
        if self.before and state.global_step > self.step and all(same):
            raise NothingLearned(
                f"{state.global_step - self.step} steps changed no trained parameter. Is trainer.learning_rate="
                f"{args.learning_rate:g} too small, or does the loss have no gradient?"
            )


def _sample(model: Any) -> list[Tensor]:
    """Copies of some values of every trained parameter, of small ones all; none of what other processes hold."""
    trained = [p.detach() for p in model.parameters() if p.requires_grad and p.numel() and not isinstance(p, DTensor)]
    return [p.flatten()[:: max(1, p.numel() // _SAMPLED)].clone() for p in trained]


class _MetricsFile(TrainerCallback):
    """Keeps `metrics.jsonl`: one line per logged step, whole after every log and right after a resume."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_whole(self.file, "".join(json.dumps(line) + "\n" for line in state.log_history))
