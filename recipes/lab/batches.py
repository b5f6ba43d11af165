"""Rows as batches, tokenised and collated as TRL does."""

from __future__ import annotations

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from steertune.trainers import Batch, collator
from steertune.trainers.data import tokenised_rows


def batches(tokenizer: PreTrainedTokenizerBase, data: Dataset, size: int) -> list[Batch]:
    """Pairs or demonstrations, tokenised and collated as TRL does, `size` in a batch."""
    rows = tokenised_rows(data, tokenizer)
    collate = collator(Dataset.from_list(rows[:1]), tokenizer)
    return [Batch.read(collate(rows[i : i + size])) for i in range(0, len(rows), size)]
