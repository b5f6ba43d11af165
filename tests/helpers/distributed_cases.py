r"""What two processes must do as one does: run by `test_distributed.py` in itself, and in each process it launches.

accelerate launch --config_file recipes/configs/accelerate/cpu_ddp.yaml \
    tests/helpers/distributed_cases.py FOLDER ddp fsdp2:few
accelerate launch --config_file recipes/configs/accelerate/cpu_zero3.yaml \
    tests/helpers/distributed_cases.py FOLDER zero3:few
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_data
import torch
import yaml
from accelerate import PartialState
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_models import tiny
from transformers import AutoModelForCausalLM

from steertune.adapters import SteeringVectorConfig
from steertune.recipes.lab.paths import LAUNCHES
from steertune.trainers import CheckpointError

ROWS = 4  # of a step, over all processes
STEPS = 3
VECTOR = dict(layers=[2])
# random in both factors: gradients that are rounding noise would be blown up by Adam
UPPER_LORA = dict(
    r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[2, 3], init_lora_weights=False,
    task_type="CAUSAL_LM",
)  # fmt: skip


def _vector(**switches: Any) -> SteeringVectorConfig:
    return SteeringVectorConfig(**{**VECTOR, **switches})


# name -> trainer, its options; evaluation rows are 5, so that two processes cannot share them evenly
CASES: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
    "plain, BiPO's drawn strengths, memo": lambda: (
        "plain", dict(peft_config=_vector(), loss="bipo", frozen_prefix=True)),
    "plain, RePS's drawn strengths, accumulated": lambda: (
        "plain", dict(peft_config=_vector(), loss="reps", gradient_accumulation_steps=2, frozen_prefix=True)),
    "SFT, its own loss": lambda: ("sft", dict(peft_config=_vector(layers="all"))),
    "SFT, cross-entropy, LoRA, memo": lambda: (
        "sft", dict(peft_config=LoraConfig(**UPPER_LORA), loss="cross_entropy", frozen_prefix=True)),
    "DPO, its own loss": lambda: ("dpo", dict(peft_config=_vector(positions="completion"), frozen_prefix=True)),
    "DPO, our loss, LoRA, memo": lambda: (
        "dpo", dict(peft_config=LoraConfig(**UPPER_LORA), loss="dpo", frozen_prefix=True)),
    "DPO, started from data": lambda: ("dpo", dict(peft_config=_vector(init="mean_difference"), loss="ipo")),
}  # fmt: skip

RESUMED = ["plain, BiPO's drawn strengths, memo", "DPO, our loss, LoRA, memo"]
# what runs by default: every trainer once, vectors and LoRA
FEW = {
    "ddp": ["plain, BiPO's drawn strengths, memo", "SFT, its own loss", "DPO, our loss, LoRA, memo"],
    "fsdp2": ["SFT, cross-entropy, LoRA, memo", "DPO, its own loss"],
    "zero3": ["plain, BiPO's drawn strengths, memo", "SFT, its own loss"],
}


def cases(mode: str, few: bool = False) -> list[str]:
    """The cases of a set-up. DeepSpeed cannot follow `strength="null"` of RePS under ZeRO-3, where it is refused."""
    return FEW[mode] if few else [case for case in CASES if not (mode == "zero3" and "RePS" in case)]


def base(folder: Path, mode: str) -> Any:
    """The same tiny model everywhere, in the shape of a set-up."""
    options: dict[str, Any] = {}
    if mode == "fsdp2":
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(fsdp_size=PartialState().num_processes)
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, **options)


def make(folder: Path, mode: str, case: str, at: Path, **changes: Any) -> Any:
    """A trainer of a case; every process takes its share of `ROWS`."""
    kind, options = CASES[case]()
    processes = PartialState().num_processes if mode != "alone" else 1
    steps = options.get("gradient_accumulation_steps", 1)
    own = options.get("loss") not in (None, "cross_entropy")  # averages rows: the rows of a batch decide what is drawn
    data = tiny_data.demonstrations if kind == "sft" else tiny_data.pairs
    return tiny_data.trainer(
        kind, at, model=base(folder, mode), data=data(12), eval_dataset=data(5, seed=7), max_steps=STEPS,
        **{**options, "per_device_train_batch_size": ROWS // processes // steps,
           "per_device_eval_batch_size": 2 // processes if own else 1, **changes},
    )  # fmt: skip


def look(folder: Path, mode: str, case: str) -> dict[str, Any]:
    """Train, evaluate, save; what is to be equal."""
    at = folder / mode / str(list(CASES).index(case))
    made = make(folder, mode, case, at)
    made.train()
    measured = made.evaluate()
    made.save_model(str(at / "adapter"))
    made.accelerator.wait_for_everyone()
    found: dict[str, Any] = {f"eval {k}": v for k, v in measured.items() if _kept(k)}
    for line in made.state.log_history:
        found |= {f"step {line['step']} {k}": v for k, v in line.items() if "loss" in line and _kept(k)}
    found |= {f"weight {k}": v.tolist() for k, v in load_file(at / "adapter" / "adapter_model.safetensors").items()}
    shortcut = made.pay_once.cached_pass
    found["skipped"] = 0 if shortcut is None else shortcut.skipped
    found["logged"] = len(made.state.log_history)
    return found


def resume(folder: Path, mode: str, case: str) -> dict[str, Any]:
    """A straight run against one that goes on from its second step; both leave their adapter."""
    run_folder, adapters = folder / mode / "run", []
    for name, checkpoint in (("straight", None), ("resumed", run_folder / "checkpoint-2")):
        adapters.append(_end(folder, mode, case, folder / mode / name, run_folder, checkpoint))
    return {"bit-equal": tiny_data.same(*adapters), "moved": sum(float(v.abs().sum()) for v in adapters[0].values())}


def resume_from(folder: Path, mode: str, case: str, checkpoint: Path) -> dict[str, Any]:
    """What comes of a checkpoint that another number of processes saved; or why it is refused."""
    at = folder / mode / "from-others"
    try:
        return {f"weight {k}": v.tolist() for k, v in _end(folder, mode, case, at / "adapter", at, checkpoint).items()}
    except (CheckpointError, ValueError) as error:
        return {"refused": f"{type(error).__name__}: {error}"}


def _end(folder: Path, mode: str, case: str, at: Path, run_folder: Path, checkpoint: Path | None) -> dict[str, Any]:
    """Train a case to its end, from a checkpoint if there is one; the adapter it leaves."""
    made = make(folder, mode.partition(" ")[0], case, run_folder, save_strategy="steps", save_steps=2)
    made.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    made.save_model(str(at))
    made.accelerator.wait_for_everyone()
    return load_file(at / "adapter_model.safetensors")


def _kept(key: str) -> bool:
    return not key.endswith(("runtime", "per_second", "total_flos", "epoch", "num_tokens"))


def run(folder: Path, mode: str, few: bool = False) -> None:
    """All cases of a set-up; each process writes what it saw."""
    found: dict[str, Any] = {case: look(folder, mode, case) for case in cases(mode, few)}
    resumed = [] if mode == "fsdp2" else RESUMED[:1] if few or mode == "alone" else RESUMED
    for case in resumed:
        found[f"resume: {case}"] = resume(folder, f"{mode} {case[:3]}", case)
    if mode != "alone":
        case = RESUMED[0]
        found["from one process"] = resume_from(
            folder, mode, case, folder / f"alone {case[:3]}" / "run" / "checkpoint-2"
        )
    rank = PartialState().process_index if mode != "alone" else 0
    (folder / f"{mode}-{rank}.json").write_text(json.dumps(found))


def configure(mode: str) -> None:
    """What `accelerate launch` hands over of a configuration with DeepSpeed: one launch runs several stages."""
    read = yaml.safe_load((LAUNCHES / f"cpu_{mode}.yaml").read_text())["deepspeed_config"]
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(read["zero_stage"])
    os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = str(read["zero3_init_flag"]).lower()
    os.environ["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] = str(read.get("zero3_save_16bit_model", False)).lower()


def prepare(folder: Path) -> None:
    """The base model on disk."""
    tiny().save_pretrained(folder / "model")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    place = Path(sys.argv[1])
    for chosen in sys.argv[2:]:
        name, _, extent = chosen.partition(":")
        if name.startswith("zero"):
            configure(name)
        keep = tiny_data.arguments("plain", place / "keep")  # under ZeRO-3, models are built sharded while this lives
        run(place, name, few=extent == "few")
        del keep
    PartialState().destroy_process_group()
