"""Trainings with randomly combined options, ours beside the stock trainer's: equal numbers, or a refusal by name.

python tests/helpers/differential.py SEED   # shows one case, and what both did
"""

from __future__ import annotations

import random
import re
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_data
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_models import tiny
from transformers import Trainer, set_seed
from trl import DPOTrainer, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from steertune.adapters import SteeringVectorConfig
from steertune.losses import get_loss
from steertune.trainers import tokenise

PARENTS = {"plain": Trainer, "sft": SFTTrainer, "dpo": DPOTrainer}
STEPS = 3
# what ours may say where the stock trainer trains; anything else is a crash
REFUSALS = [
    r"belongs to (TRL's|the parent's) own loss",
    r"rows have no label left: their prompt fills max_length",
    r"no label is left within max_length",
    r"No row has a label left",  # TRL drops all rows, trains nothing and says nothing
    r"needs one prompt in a row, but (packing|padding_free|eval_packing)=True",
    r"makes no sense. It must be",
    r"precompute_ref_log_probs=False",
    r"The stream has no row to train on",
]
TYPES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
         "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]  # fmt: skip


@dataclass
class Case:
    """One combination of options."""

    kind: str
    loss: tuple[str, dict[str, Any]] | None
    model: tuple[str, dict[str, Any]]
    adapter: tuple[str, dict[str, Any]]
    continued: bool
    shape: str
    form: str | None
    streamed: bool
    prefix: bool | None
    half: bool
    changes: dict[str, Any] = field(default_factory=dict)


def draw(seed: int) -> Case:
    """The combination of a number; most options keep their default most of the time."""
    numbers = random.Random(seed)
    pick = numbers.choice

    def rarely(value: Any, chance: float = 0.2) -> Any:
        return value if numbers.random() < chance else None

    kind = pick(["plain", "sft", "sft", "dpo", "dpo"])
    changes: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": pick([1, 2, 4]), "learning_rate": 0.01,
        "gradient_accumulation_steps": pick([1, 1, 2, 3]), "gradient_checkpointing": pick([False, False, True]),
        "optim": pick(["adamw_torch", "adamw_torch_fused", "sgd"]), "seed": numbers.randrange(100),
        "weight_decay": pick([0.0, 0.1]), "lr_scheduler_type": pick(["linear", "cosine", "constant"]),
        "max_grad_norm": pick([1.0, 0.01, 0.0]),
    }  # fmt: skip
    changes |= rarely({"data_seed": 5}) or {}
    changes |= rarely({"dataloader_drop_last": True}) or {}
    changes |= rarely({"neftune_noise_alpha": 5.0}, 0.1) or {}
    changes |= rarely({"train_sampling_strategy": "sequential"}) or {}
    changes |= rarely({"bf16": True}, 0.1) or {}
    changes |= rarely({"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": pick([1, 2, 8])}) or {}
    changes |= rarely({"label_smoothing_factor": 0.1}, 0.07) or {}
    changes |= rarely({"warmup_steps": 1}) or {}
    form, streamed = pick([None, None, None, "torch", "numpy"]), False
    if kind == "dpo":
        shape, loss = pick(["standard", "conversational", "implicit"]), _dpo(numbers, changes)
    else:
        shape = pick(["standard", "conversational", "text", "messages", "tokenised"])
        loss = pick([None, ("cross_entropy", {}), ("cross_entropy", {})])
    if kind == "sft":
        _sft(numbers, changes)
    if kind != "plain":
        streamed = numbers.random() < 0.1
        changes |= rarely({"pad_to_multiple_of": 8}, 0.15) or {}
        if "max_length" not in changes:
            changes |= rarely({"max_length": pick([6, 8, 12])}) or {}
            changes |= rarely({"truncation_mode": "keep_end"}, 0.1) or {}
    model = pick([("llama", {}), ("llama", {}), ("gpt2", {}), ("gemma2", {}), ("qwen2", {}), ("gpt_neox", {}),
                  ("mixtral", {})])  # fmt: skip
    if model[0] == "gpt2" and loss == ("cross_entropy", {}):
        model = ("llama", {})  # of GPT-2's labels, the stock trainers count the first, which nothing predicts
    if loss is not None and kind == "dpo":
        changes.pop("neftune_noise_alpha", None)  # TRL's reference is noisy as well, ours never
    if model[0] == "mixtral" and kind != "plain" and loss is not None:
        changes["router_aux_loss_coef"] = 0.0  # else TRL adds a loss of the router's
    return Case(kind, loss, model, _adapter(numbers, model[0]), numbers.random() < 0.25, shape, form, streamed,
                pick([None, None, True, False]), numbers.random() < 0.07, changes)  # fmt: skip


def _dpo(numbers: random.Random, changes: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    beta = numbers.choice([0.1, 0.5])
    changes["beta"] = beta
    extra = [{"ld_alpha": 0.5}, {"use_weighting": True}, {"f_divergence_type": "js_divergence"},
             {"loss_weights": [0.5]}, {"label_smoothing": 0.1}, {"discopop_tau": 0.1}]  # fmt: skip
    if numbers.random() < 0.15:
        changes |= {"precompute_ref_log_probs": True}
    if numbers.random() < 0.15:
        changes |= numbers.choice(extra)
    if numbers.random() < 0.5:
        changes["loss_type"] = numbers.choice(TYPES)
        if changes["loss_type"] == "exo_pair":
            changes["label_smoothing"] = 0.1
        return None
    name = numbers.choice(["dpo", "ipo"])
    changes["loss_type"] = {"dpo": "sigmoid", "ipo": "ipo"}[name]
    return name, {"beta": beta}


def _sft(numbers: random.Random, changes: dict[str, Any]) -> None:
    several = [dict(packing=True, packing_strategy=name, max_length=length)
               for name in ("wrapped", "bfd", "bfd_split") for length in (8, 16)]  # fmt: skip
    if numbers.random() < 0.3:
        changes |= numbers.choice([*several, dict(padding_free=True, max_length=None)])
    for chance, option in (
        (0.2, {"completion_only_loss": False}), (0.15, {"shuffle_dataset": True}), (0.05, {"loss_type": "dft"}),
        (0.1, {"eval_packing": False}),
    ):  # fmt: skip
        changes |= option if numbers.random() < chance else {}


def _adapter(numbers: random.Random, model: str) -> tuple[str, dict[str, Any]]:
    if numbers.random() < 0.25 and model in ("llama", "qwen2", "gemma2", "mixtral"):
        targets = numbers.choice([["q_proj"], ["q_proj", "v_proj"]])
        return "lora", dict(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    return "vector", dict(
        init=numbers.choice(["zeros", "random"]), layers=numbers.choice([2, 3, [1, 3], "all", 0]),
        form=numbers.choice(["bias", "bias", "gated", "linear", "low_rank"]),
        site=numbers.choice(["block", "block", "attention", "mlp"]),
        positions=numbers.choice(["all", "all", "all", "completion", "prompt", "last_prompt"]),
    )  # fmt: skip


def data_of(case: Case, rows: int, seed: int) -> Any:
    """Rows in the case's shape and format."""
    if case.kind == "dpo":
        data = tiny_data.pairs(rows, seed)
        if case.shape == "implicit":
            data = Dataset.from_list(
                [{s: row["prompt"] + row[s] for s in ("chosen", "rejected")} for row in data.to_list()]
            )
    else:
        data = tiny_data.demonstrations(rows, seed)
    if case.shape in ("conversational", "messages"):
        data = tiny_data.conversational(data)
    if case.shape == "messages":
        data = Dataset.from_list([{"messages": row["prompt"] + row["completion"]} for row in data.to_list()])
    if case.shape == "text":
        data = Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in data.to_list()])
    if case.shape == "tokenised" or case.kind == "plain":
        data = tokenise(data, tiny_data.tokenizer())
    data = data.to_iterable_dataset() if case.streamed else data
    return data if case.form is None else data.with_format(case.form)


def run(case: Case, folder: Path, ours: bool) -> dict[str, Any]:
    """Train one side of a case; what it logged, and its weights. An error is kept, with the moment it came at."""
    kind = case.kind
    model = tiny(case.model[0], **case.model[1])
    model = model.bfloat16() if case.half else model
    name, switches = case.adapter
    config = LoraConfig(**switches) if name == "lora" else SteeringVectorConfig(**switches)
    # TRL's DPO averages every micro-batch, however small, and ours all pairs of a step: whole micro-batches then
    rows = 24 if case.changes["gradient_accumulation_steps"] > 1 else 14
    given: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    try:
        args = tiny_data.arguments(kind, folder, **case.changes)
        if case.continued or (kind == "plain" and not ours):
            set_seed(args.seed)
            model = get_peft_model(model, config)
        elif ours or kind != "plain":
            given["peft_config"] = config
        if kind == "plain":
            given["data_collator"] = DataCollatorForLanguageModeling(pad_token_id=0)
        if "eval_strategy" in case.changes:
            given["eval_dataset"] = data_of(case, 5, 7)
        if ours:
            loss = None if case.loss is None else get_loss(case.loss[0], **case.loss[1])
            given |= {"loss": loss, "frozen_prefix": case.prefix}
        trainer = (tiny_data.TRAINERS if ours else PARENTS)[kind](
            model=model,
            args=args,
            train_dataset=data_of(case, rows, 0),
            processing_class=tiny_data.tokenizer(),
            **given,
        )
        trainer.train()
    except Exception as error:
        steps = 0 if "trainer" not in locals() else trainer.state.global_step
        return {"error": error, "steps": steps}
    for line in trainer.state.log_history:
        for key in ("loss", "grad_norm", "eval_loss"):
            seen |= {f"{key} {line['step']}": line[key]} if key in line else {}
    seen["weights"] = tiny_data.values(trainer.model)
    return seen


def problem(case: Case, folder: Path) -> str | None:
    """What is wrong about a case; "refused" where ours says why it does not train; None: both do the same."""
    ours, theirs = (run(case, folder / name, ours=name == "ours") for name in ("ours", "theirs"))
    if "error" in ours:
        text = f"{type(ours['error']).__name__}: {ours['error']}"
        if "error" in theirs:
            return "refused"
        named = isinstance(ours["error"], ValueError) and any(re.search(each, text) for each in REFUSALS)
        return "refused" if named and ours["steps"] == 0 else f"crashed at step {ours['steps']}: {text:.400}"
    if "error" in theirs:
        return None  # ours can do more (conversations in numpy's format, say)
    return _difference(case, ours, theirs)


def _difference(case: Case, ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    coarse = case.half or "bf16" in case.changes
    by_token = case.loss is not None and case.loss[0] == "cross_entropy"  # evaluated over all tokens, not by batch
    for key in (key for key in theirs if key != "weights"):
        if key not in ours:
            return f"{key} is not logged"
        # Adam makes more of what is rounded in the first step
        tolerance = 3e-2 if coarse else 2e-6 if key == "loss 1" else 1e-5 if key == "grad_norm 1" else 1e-4
        # of a stream, the stock trainers count the last batch as if it were full
        if (by_token or case.streamed) and key.startswith("eval"):
            continue
        one, two = ours[key], theirs[key]
        if not abs(one - two) <= tolerance * max(1.0 if "loss" in key else 0.01, abs(two)):
            return f"{key}: ours {one!r}, theirs {two!r}"
    for name, value in ours["weights"].items():
        error = (value.float() - theirs["weights"][name].float()).abs().max()
        if not coarse and error > 1e-4:
            return f"weights {name} differ by {error:.2g}"
    return None


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for number in sys.argv[1:]:
        drawn = draw(int(number))
        print(drawn, problem(drawn, Path("/tmp/differential")), sep="\n")
