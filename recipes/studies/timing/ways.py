"""The ways to train that are timed against each other."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import BeftConfig, LoraConfig, PeftConfig
from torch.profiler import record_function
from transformers import TrainerCallback

from steertune.adapters import SteeringVectorConfig
from steertune.recipes.lab.training import silent
from steertune.recipes.studies.timing.rows import Rows
from steertune.trainers import FrozenPrefix, SteeringDPOTrainer, SteeringSFTTrainer, share_weights, train_together

STEP = "training step"
"""Name of every optimiser step in a profile."""


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        kind: Data: `sft` (demonstrations) or `dpo` (pairs).
        adapter: Layer -> configuration of the adapter; None for full finetuning.
        loss: A loss of ours; None for TRL's own.
        frozen_prefix: Whether frozen layers are cached.
        arms: How many such arms train together; times are per arm.
        against: Name of the way that it is compared with; "" for TRL + LoRA on the same data.
    """

    kind: str
    adapter: Callable[[int], PeftConfig | None]
    loss: str | None = None
    frozen_prefix: bool = False
    arms: int = 1
    against: str = ""

    @property
    def baseline(self) -> str:
        """The way that it is compared with."""
        return self.against or AGAINST[self.kind]


def _lora(layer: int) -> PeftConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def _upper(layer: int) -> PeftConfig:
    # PEFT accepts layers only together with a list of modules; the vector's layer is at two thirds of the depth
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layers = list(range(layer, layer + layer // 2))
    return LoraConfig(r=8, lora_alpha=16, target_modules=modules, layers_to_transform=layers, task_type="CAUSAL_LM")


def _beft(layer: int) -> PeftConfig:
    return BeftConfig(target_modules=["down_proj"], task_type="CAUSAL_LM")


def _vector(layer: int) -> PeftConfig:
    return SteeringVectorConfig(layers=layer)


def on_completions(layer: int) -> PeftConfig:
    """A vector that leaves prompts alone."""
    return SteeringVectorConfig(layers=layer, positions="completion")


WAYS = {
    "SFT: TRL + LoRA r8": Way("sft", _lora),
    "SFT: TRL + BEFT": Way("sft", _beft),
    "SFT: TRL, full finetuning": Way("sft", lambda layer: None),
    "SFT: TRL + our vector": Way("sft", _vector),
    "SFT: one import changed": Way("sft", _vector, None, True),
    "SFT: ours, head on labels": Way("sft", _vector, "cross_entropy"),
    "SFT: ours, and frozen prefix": Way("sft", _vector, "cross_entropy", True),
    "SFT: ours, on completions only": Way("sft", on_completions, "cross_entropy", True),
    "pairs: TRL + LoRA r8": Way("dpo", _lora),
    "pairs: TRL + BEFT": Way("dpo", _beft),
    "pairs: TRL + our vector": Way("dpo", _vector),
    "pairs: one import changed": Way("dpo", _vector, None, True),
    "pairs: ours, head on labels": Way("dpo", _vector, "dpo"),
    "pairs: ours, and frozen prefix": Way("dpo", _vector, "dpo", True),
    "pairs: ours, on completions only": Way("dpo", on_completions, "dpo", True),
    "pairs: ours, and frozen prefix, 4 arms together": Way("dpo", _vector, "dpo", True, arms=4),
    "SFT: TRL + LoRA in the upper third": Way("sft", _upper, against="SFT: TRL + LoRA in the upper third"),
    "SFT: ours + LoRA in the upper third": Way(
        "sft", _upper, "cross_entropy", True, against="SFT: TRL + LoRA in the upper third"
    ),
    "pairs: TRL + LoRA in the upper third": Way("dpo", _upper, against="pairs: TRL + LoRA in the upper third"),
    "pairs: ours + LoRA in the upper third": Way(
        "dpo", _upper, "dpo", True, against="pairs: TRL + LoRA in the upper third"
    ),
}
"""With `loss=None` and `frozen_prefix=False`, our trainers do what TRL's do."""
AGAINST = {"sft": "SFT: TRL + LoRA r8", "dpo": "pairs: TRL + LoRA r8"}


class Run:
    """A way to train, ready to run: its trainer (or trainers), each on its own copy of the model.

    Args:
        way: The way.
        model: The base model.
        tokenizer: Its tokenizer.
        rows: What it trains on.
        layer: Layer of the vector.
        folder: Where trainers write.
    """

    def __init__(self, way: Way, model: Any, tokenizer: Any, rows: Rows, layer: int, folder: str) -> None:
        self.clock = _Clock()
        prefix = FrozenPrefix() if way.frozen_prefix else False
        self.trainers = [_trainer(way, model, tokenizer, rows, layer, folder, prefix) for _ in range(way.arms)]
        self.trainers[0].add_callback(self.clock)

    def __call__(self, steps: int) -> list[float]:
        """Train for `steps` steps; returns the seconds of each, per arm."""
        self.clock.seconds.clear()
        for trainer in self.trainers:
            trainer.args.max_steps = steps
        if len(self.trainers) > 1:
            train_together(self.trainers)
        else:
            self.trainers[0].train()
        return [seconds / len(self.trainers) for seconds in self.clock.seconds]


def _trainer(way: Way, model: Any, tokenizer: Any, rows: Rows, layer: int, folder: str, prefix: Any) -> Any:
    from trl import DPOConfig, SFTConfig

    pairs = way.kind == "dpo"
    trainer_class, config_class = (SteeringDPOTrainer, DPOConfig) if pairs else (SteeringSFTTrainer, SFTConfig)
    args = config_class(
        output_dir=folder,
        per_device_train_batch_size=rows.pairs if pairs else rows.batch,
        max_steps=rows.steps,
        learning_rate=1e-4,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_length=None,
    )
    made = trainer_class(
        model=share_weights(model) if way.arms > 1 else copy.deepcopy(model),
        args=args,
        train_dataset=rows.data(tokenizer, way.kind),
        processing_class=tokenizer,
        peft_config=way.adapter(layer),
        loss=way.loss,
        frozen_prefix=prefix,
    )
    return silent(made)


class _Clock(TrainerCallback):
    """Seconds of every optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0
        self._step = record_function(STEP)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = now()
        self._step = record_function(STEP)
        self._step.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step.__exit__(None, None, None)
        self.seconds.append(now() - self._start)


def now() -> float:
    """A clock in seconds: CPU seconds of this process with one thread, else wall time after the GPU has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()
