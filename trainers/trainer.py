"""`transformers.Trainer` for steering vectors."""

from __future__ import annotations

import copy
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from .arguments import check_plain
from .construction import check_evaluation_rows, context_of
from .data import (
    PAIR_FORMATS,
    TOKENISED_FORMATS,
    DataError,
    collator,
    data_format,
    data_sets,
    has_labels_within,
    map_data_sets,
    tokenise,
)
from .mixin import SteeringMixin


class SteeringTrainer(SteeringMixin, Trainer):
    """`transformers.Trainer` plus `peft_config=` and `loss=` (see `SteeringMixin`).

    Takes tokenised rows and any collator, as its parent does. Given text or messages in one of TRL's formats, a
    tokenizer as `processing_class` and no collator, it tokenises them and uses TRL's collators.
    """

    def _prepare_data(self, given: dict[str, Any]) -> tuple[str, ...] | None:
        check_plain(self.loss, given.get("args"))
        columns = super()._prepare_data(given)
        tokenizer = given.get("processing_class")
        if columns is None or columns in TOKENISED_FORMATS:
            return columns
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise DataError(
                f"Columns {list(columns)} are text, but processing_class={tokenizer!r:.80} cannot read "
                "it. Give processing_class=tokenizer, or tokenised rows."
            )
        if columns in PAIR_FORMATS and self.loss is None:
            raise DataError("Trainer has no loss for pairs (chosen, rejected). Give one, such as loss='dpo'.")
        self.max_length = context_of(given)
        for name in ("train_dataset", "eval_dataset"):
            given[name] = map_data_sets(lambda rows: _tokenised(rows, tokenizer, self.max_length), given.get(name))
        given["data_collator"] = collator(given["train_dataset"], tokenizer, self.max_length)
        # every column is for the collator; the parent would drop those that are not arguments of the model
        given["args"] = copy.copy(given.get("args") or TrainingArguments())
        given["args"].remove_unused_columns = False
        return columns

    def _prepare_evaluation(self, data: Any) -> Any:
        check_evaluation_rows(self, data)
        if self.columns is None:  # the user's own collator reads the rows
            return data
        for part in data_sets(data):
            columns = data_format(list(next(iter(part))))
            if columns not in TOKENISED_FORMATS and self.columns in TOKENISED_FORMATS:
                raise DataError(
                    f"Columns {list(columns)} are text, but this trainer was made with tokenised rows. Give tokenised "
                    "rows to evaluate on (steertune.trainers.tokenise(rows, tokenizer))."
                )
        return map_data_sets(lambda rows: _tokenised(rows, self.processing_class, self.max_length), data)


def _tokenised(data: Any, tokenizer: Any, max_length: int | None) -> Any:
    """Tokenise a data set of text, and drop the rows that are truncated before their first label, as TRL does."""
    if isinstance(data, IterableDataset):
        raise DataError(
            "SteeringTrainer tokenises a Dataset, not a stream. Use SteeringDPOTrainer or SteeringSFTTrainer."
        )
    if not isinstance(data, Dataset) or data_format(data.column_names) in TOKENISED_FORMATS:
        return data
    rows = tokenise(data, tokenizer, max_length)
    if max_length is None or len(rows) == 0:
        return rows
    return rows.filter(lambda row: has_labels_within(row, max_length), desc="Leaving out rows without a label")
