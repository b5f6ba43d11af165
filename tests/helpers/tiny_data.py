"""A tiny tokenizer, tiny data in TRL's formats, and trainers on them."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from tiny_models import steered, tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, TrainingArguments
from trl import DPOConfig, SFTConfig

from steertune.losses import Loss, Needs
from steertune.losses.bipo import BiPO
from steertune.trainers import SteeringDPOTrainer, SteeringSFTTrainer, SteeringTrainer

datasets.disable_progress_bars()
gc.freeze()  # every training run collects garbage; without the modules imported so far that takes a tenth of the time

WORDS = "the a cat dog runs sits red blue sky sea now then we you go stay".split()
SPECIAL = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", "<unk>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRAINERS = {"plain": SteeringTrainer, "sft": SteeringSFTTrainer, "dpo": SteeringDPOTrainer}
_ARGS = {"plain": TrainingArguments, "sft": SFTConfig, "dpo": DPOConfig}


def tokenizer(adds_bos: bool = False, template: str | None = TEMPLATE, **options) -> PreTrainedTokenizerFast:
    """One word is one token; ids below 64."""
    vocab = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"], **options,
    )  # fmt: skip
    made.chat_template = template
    return made


def _speaker(seed: int) -> Callable[[int], str]:
    numbers = random.Random(seed)
    return lambda words: " ".join(numbers.choices(WORDS, k=words))


def save_model(folder: Path, **sizes: Any) -> None:
    """Save a tiny model and the tokenizer as one folder."""
    tiny(**sizes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def save_task(folder: Path, **splits: Dataset) -> str:
    """Save the splits of a task, each in its own file, and return the folder as text."""
    for split, rows in splits.items():
        rows.to_json(folder / f"{split}.jsonl")
    return str(folder)


def save_run(folder: Path, rows: int, options: dict[str, Any], **sizes: Any) -> list[str]:
    """Save what a short run of a recipe needs, a tiny model and as many pairs in each split, and return its overrides.

    Args:
        folder: Holds all of it.
        rows: Pairs of the training and of the test split.
        options: Further overrides.
        sizes: Of the model.
    """
    save_model(folder / "model", **sizes)
    save_task(folder, train=pairs(rows, seed=5), test=pairs(rows, seed=4))
    given = {"model.name": folder / "model", "data.name": folder, "data.train": rows, "data.test": rows,
             "output.folder": folder / "run"} | options  # fmt: skip
    return [f"--{key}={value}" for key, value in given.items()]


def pairs(rows: int = 8, seed: int = 0) -> Dataset:
    """Preference pairs with an explicit prompt; rejected answers are 2 to 4 words, chosen ones 3."""
    say = _speaker(seed)
    return Dataset.from_list(
        [dict(prompt=say(3 + i % 2) + " ", chosen=say(3), rejected=say(2 + i % 3)) for i in range(rows)]
    )


def cats_and_dogs() -> dict[str, Dataset]:
    """The splits of a task that a tiny model can learn: chosen answers end in `cat`, rejected ones in `dog`."""
    sizes = {"train": 24, "validation": 8, "test": 8}
    return {
        split: pairs(rows, seed=seed).map(
            lambda row: {"chosen": f"{row['chosen']} cat", "rejected": f"{row['chosen']} dog"}
        )
        for seed, (split, rows) in enumerate(sizes.items())
    }


def demonstrations(rows: int = 8, seed: int = 0) -> Dataset:
    """Prompt and completion of 1 to 4 words, so rows differ in their number of labels."""
    say = _speaker(seed)
    return Dataset.from_list([dict(prompt=say(3) + " ", completion=say(1 + i % 4)) for i in range(rows)])


def conversational(data: Dataset) -> Dataset:
    """The same data as lists of messages."""

    def speak(row):
        return {
            column: [{"role": "user" if column == "prompt" else "assistant", "content": text.strip()}]
            for column, text in row.items()
        }

    return data.map(speak)


def arguments(kind: str, folder: Any, **changes) -> Any:
    """Training arguments: three steps of four examples on the CPU in fp32, every step logged."""
    options: dict[str, Any] = dict(
        use_cpu=True, bf16=False, report_to="none", max_steps=3, per_device_train_batch_size=4, logging_steps=1,
        learning_rate=0.05, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )  # fmt: skip
    return _ARGS[kind](str(folder), **{**options, **changes})


def trainer(kind: str, folder: Any, model: Any = None, data: Dataset | None = None, **options) -> Any:
    """One of our trainers (`plain`, `sft`, `dpo`) on a tiny llama; training arguments and its own may be mixed."""
    own = {
        "peft_config", "loss", "vector_learning_rate", "frozen_prefix", "views", "inductive_biases", "biases",
        "ref_model", "eval_dataset", "processing_class", "data_collator", "compute_metrics", "optimizers",
    }  # fmt: skip
    given = {name: options.pop(name) for name in list(options) if name in own}
    given.setdefault("processing_class", tokenizer())
    if data is None:
        data = demonstrations() if kind == "sft" else pairs()
    return TRAINERS[kind](
        model=tiny() if model is None else model,
        args=arguments(kind, folder, **options),
        train_dataset=data,
        **given,
    )


def trained(*args: Any, **options) -> Any:
    """The same, after training."""
    made = trainer(*args, **options)
    made.train()
    return made


def history(made: Any, *names: str) -> list[dict[str, float]]:
    """What was logged, without timings; of the named keys only, if there are names."""
    timings = ("runtime", "per_second", "total_flos")
    logged = [{k: v for k, v in entry.items() if not k.endswith(timings)} for entry in made.state.log_history]
    if not names:
        return logged
    return [{k: entry[k] for k in names} for entry in logged if set(names) <= set(entry)]


def losses(made: Any) -> list[float]:
    """The training loss of every step."""
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every trainable parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Spy(Loss):
    """BiPO that remembers the directions it drew."""

    needs = Needs(reference=True, strengths=(-1.0,))

    def __init__(self):
        self.drawn = []

    def __call__(self, at, generator=None):
        value = BiPO()(at, generator)
        self.drawn.append(next(strength for strength in at.seen if strength))
        return value


def saved_on_its_base(home: Path, **changes) -> Path:
    """A saved adapter with vectors at layers 1 and 2, its tiny base with a tokenizer beside it."""
    base = tiny(**changes)
    base.save_pretrained(home / "base")
    tokenizer().save_pretrained(home / "base")
    model = steered(base, layers=[1, 2])
    model.peft_config["default"].base_model_name_or_path = str(home / "base")
    model.save_pretrained(home / "adapter")
    return home / "adapter"
