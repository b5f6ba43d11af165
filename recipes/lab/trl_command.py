"""TRL's command line with our trainers: all of its flags, plus a steering vector's switches as `--steering_...`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import load_dataset
from peft import PeftConfig
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from steertune.adapters import SteeringVectorConfig
from steertune.losses import get_loss
from steertune.recipes.lab import embedded, trained_on
from steertune.recipes.lab.arm import check_keys
from steertune.recipes.lab.command_line import outcome
from steertune.recipes.lab.files import ArmError, toml_value
from steertune.recipes.lab.keys import REFUSED
from steertune.recipes.lab.parsing import check_words
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.similarity import By, told_apart_by
from steertune.recipes.lab.sources import find_split, has_one_split, load_parts
from steertune.recipes.lab.trained_on import TrainedOn
from steertune.trainers.arguments import check_ranges

PREFIX = "steering_"


@dataclass
class SteeringArguments:
    """The vector to train, and its loss. Values are written as in TOML: `--steering_layers "[10, 0.5]"`."""

    steering_layers: str = field(
        default="0.667", metadata={"help": "a block, a fraction of the depth, a list of either, or all"}
    )
    steering_form: str = field(default="bias", metadata={"help": "bias, span, gated, linear, low_rank or project"})
    steering_rank: int = field(default=1, metadata={"help": "rank of low_rank"})
    steering_basis: str | None = field(
        default=None, metadata={"help": "the vectors of span: an adapter folder, or a list of them"}
    )
    steering_tied: bool = field(default=False, metadata={"help": "one vector for all layers"})
    steering_site: str = field(default="block", metadata={"help": "block, attention or mlp"})
    steering_norm: str = field(default="free", metadata={"help": "free, fixed, capped, relative, preserve or learned"})
    steering_norm_value: float | None = field(default=None, metadata={"help": "value of fixed, capped and relative"})
    steering_length_rate: float = field(
        default=1.0, metadata={"help": "learning rate of the length for learned, relative to that of the direction"}
    )
    steering_positions: str = field(default="all", metadata={"help": "all, completion, prompt or last_prompt"})
    steering_init: str = field(
        default="zeros", metadata={"help": "zeros, random, or a direction such as mean_difference"}
    )
    steering_init_scale: float = field(default=1.0, metadata={"help": "multiplies the initial vector"})
    steering_init_weights: bool = field(default=True, metadata={"help": "False is PEFT's name for init=random"})
    threads: int | None = field(
        default=None,
        metadata={"help": "CPU threads (OMP_NUM_THREADS, else the cores that this process can use)"},
    )
    loss: str | None = field(default=None, metadata={"help": "a file of losses/, such as bipo (TRL's own loss)"})
    loss_options: str = field(default="{}", metadata={"help": 'options of the loss, such as "{beta = 0.2}"'})

    def peft_config(self) -> SteeringVectorConfig:
        """The adapter.

        Raises:
            ValueError: a value that is out of range.
        """
        values = {f.name.removeprefix(PREFIX): getattr(self, f.name) for f in dataclasses.fields(self)}
        switches = {name: value for name, value in values.items() if name not in ("threads", "loss", "loss_options")}
        basis = None if self.steering_basis is None else toml_value(self.steering_basis)
        return SteeringVectorConfig(**{**switches, "layers": toml_value(self.steering_layers), "basis": basis})

    def loss_object(self) -> Any:
        """The loss; None for TRL's own.

        Raises:
            ValueError: an unknown loss or option.
        """
        options = toml_value(self.loss_options)
        if not isinstance(options, dict):
            raise ArmError(f"--loss_options must be a table (got {self.loss_options!r}). Write '{{beta = 0.2}}'.")
        if self.loss is None:
            check_keys("loss_options", options, [])
            return None
        return get_loss(self.loss, **options)


def run(trainer_class: type, arguments_class: Any, argv: Sequence[str] | None, prog: str, doc: str) -> int:
    """Run the command line of one of our trainers with TRL's arguments for it; return the exit code."""
    classes = (ScriptArguments, arguments_class, ModelConfig, DatasetMixtureConfig, SteeringArguments)
    parser = TrlParser(classes, prog=f"steertune {prog}", description=doc)  # pyright: ignore[reportArgumentType]
    if not torch.cuda.is_available():  # TRL's defaults need a GPU
        parser.set_defaults(bf16=False, use_cpu=True)

    def parse_and_train() -> int:
        check_words(list(sys.argv[1:] if argv is None else argv))
        parsed: Any = parser.parse_args_and_config(list(sys.argv[1:] if argv is None else argv))
        train(trainer_class, *parsed)
        return 0

    return outcome(parse_and_train)


def train(
    trainer_class: Any,
    script: ScriptArguments,
    args: Any,
    model: ModelConfig,
    mixture: Any,
    steering: SteeringArguments,
) -> None:
    """Load data, make the trainer, train and save, like TRL's scripts.

    Raises:
        ValueError: no data or model is given, a split is missing, or a value is out of range.
    """
    if args.hub_token:
        raise ArmError(f"--hub_token: {REFUSED['hub_token']}")
    check_ranges(args)
    begin(steering.threads)
    adapter: PeftConfig | None = get_peft_config(model) or steering.peft_config()
    loss = steering.loss_object()
    datasets, by = _datasets(script, mixture, args.eval_strategy != "no")
    trainer = trainer_class(
        args=args,
        peft_config=adapter,
        loss=loss,
        **_model(model, args),
        **datasets,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if by is not None and trainer.is_world_process_zero():
        trained_on.write(Path(args.output_dir), [TrainedOn.of(datasets["train_dataset"], by)])
    trainer.accelerator.print(f"Saved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


def _datasets(
    script: ScriptArguments, mixture: DatasetMixtureConfig, evaluates: bool
) -> tuple[dict[str, Any], By | None]:
    """The trainer's data sets: from TRL's mixture, an embedded task, local files, or the Hub. A single file is divided
    if the trainer evaluates.

    Returns:
        Keyword arguments of the trainer, and what tells local rows apart (None for other data).

    Raises:
        ArmError: no data, no such split, or nothing to evaluate on.
    """
    name: Any = script.dataset_name
    train, test = script.dataset_train_split, script.dataset_test_split
    splits = {"train_dataset": train} | ({"eval_dataset": test} if evaluates else {})
    if not mixture.datasets and not name:
        raise ArmError("No data: give --dataset_name (a Hub name, a folder, a file, an embedded task) or datasets:.")
    local = not mixture.datasets and (name in embedded.task_names() or Path(name).exists())
    if local and evaluates and has_one_split(name, train, test):
        parts = load_parts(name, train, test)
        if not len(parts.test):
            raise ArmError(f"{parts.note} Give more rows, or turn evaluation off: --eval_strategy no.")
        PartialState().print(parts.note)
        return {"train_dataset": parts.train, "eval_dataset": parts.test}, parts.by

    if local:
        data = {split: rows for split in splits.values() if (rows := find_split(name, split)) is not None}
    elif mixture.datasets:
        data = get_dataset(mixture)
    else:
        data = load_dataset(name, name=script.dataset_config, streaming=script.dataset_streaming)
    for split in splits.values():
        if split not in data:
            raise ArmError(f"The data have no split {split!r}. They have {sorted(data)}.")
    if len({*splits.values()}) < len(splits):
        raise ArmError(
            f"--dataset_train_split and --dataset_test_split are both {test!r}, so evaluation "
            "would read training rows. Name another split, or set --eval_strategy no."
        )
    rows: Any = {argument: data[split] for argument, split in splits.items()}
    return rows, told_apart_by(rows["train_dataset"].to_list()) if local else None


def _model(model: ModelConfig, args: Any) -> dict[str, Any]:
    """Keyword arguments that give a trainer its model, like TRL's scripts; `embedded` needs no Hub."""
    name = model.model_name_or_path
    if name is None:
        raise ArmError("No model: give --model_name_or_path (a Hub name, a local folder, or embedded).")
    if name == "embedded":
        dtype = getattr(torch, model.dtype or "float32", None)
        if not isinstance(dtype, torch.dtype):
            raise ArmError(f"--dtype must be float32, bfloat16 or float16 for the embedded model (got {model.dtype}).")
        return {"model": embedded.load_model(dtype), "processing_class": embedded.load_tokenizer()}
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    return {"model": name, "quantization_config": get_quantization_config(model)}
