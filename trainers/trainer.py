"""`transformers.Trainer` for steering vectors."""

from __future__ import annotations

import copy
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from ._data import PAIR_FORMATS, TOKENISED_FORMATS, DataError, collator, tokenise
from ._mixin import SteeringMixin
from .arguments import check_plain

_NO_LIMIT = 10**6  # tokenizers without a maximum length say 10**30


class SteeringTrainer(SteeringMixin, Trainer):
    """`transformers.Trainer` plus `peft_config=` and `loss=` (see `SteeringMixin`).

    Takes tokenised rows and any collator, as its parent does. Given text or messages in one of TRL's formats, a
    tokenizer as `processing_class` and no collator, it tokenises them and uses TRL's collators.
    """

    def _prepare_data(self, given: dict[str, Any]) -> tuple[str, ...] | None:
        check_plain(self.loss, given.get("args"))
        wanted = super()._prepare_data(given)
        tokenizer = given.get("processing_class")
        if wanted is None or wanted in TOKENISED_FORMATS:
            return wanted
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise DataError(
                f"Columns {list(wanted)} are text, and processing_class={tokenizer!r:.80} is no tokenizer to read it. "
                "Give processing_class=tokenizer, or tokenised rows."
            )
        if wanted in PAIR_FORMATS and self.loss is None:
            raise DataError("Trainer has no loss for pairs (chosen, rejected): give one, such as loss='dpo'.")
        limit = self.max_length = tokenizer.model_max_length if tokenizer.model_max_length < _NO_LIMIT else None
        for name in ("train_dataset", "eval_dataset"):
            given[name] = _tokenise_all(given.get(name), tokenizer, limit)
        given["data_collator"] = collator(given["train_dataset"], tokenizer, limit)
        # every column is for the collator; the parent would drop those that are not arguments of the model
        given["args"] = copy.copy(given.get("args") or TrainingArguments())
        given["args"].remove_unused_columns = False
        return wanted


def _tokenise_all(data: Any, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Any:
    if isinstance(data, dict):
        return {name: _tokenise_all(part, tokenizer, limit) for name, part in data.items()}
    if isinstance(data, IterableDataset):
        raise DataError(
            "SteeringTrainer tokenises a Dataset, not a stream. Use SteeringDPOTrainer or SteeringSFTTrainer."
        )
    return tokenise(data, tokenizer, limit) if isinstance(data, Dataset) else data
