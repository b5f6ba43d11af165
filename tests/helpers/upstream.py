"""The stock trainers that ours are compared with."""

from __future__ import annotations

from tiny_data import (
    arguments,
    demonstrations,
    pairs,
    tokenizer,
    trainer,
)
from tiny_models import tiny
from transformers import Trainer
from trl import DPOTrainer, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

PARENTS = {"plain": Trainer, "sft": SFTTrainer, "dpo": DPOTrainer}


def tokenised() -> dict:
    """Rows and a collator for the plain Trainer."""
    rows = trainer("plain", "/tmp", data=demonstrations(), loss="cross_entropy").train_dataset
    return dict(data=rows, data_collator=DataCollatorForLanguageModeling(pad_token_id=0))


def upstream(kind: str, folder, data=None, peft_config=None, model=None, changes=None, **options):
    """The parent's own training with the same arguments."""
    data = data if data is not None else demonstrations() if kind == "sft" else pairs()
    if kind != "plain":
        options["peft_config"] = peft_config
    made = PARENTS[kind](
        model=tiny() if model is None else model, args=arguments(kind, folder, **(changes or {})), train_dataset=data,
        processing_class=tokenizer(), **options,
    )  # fmt: skip
    made.train()
    return made
