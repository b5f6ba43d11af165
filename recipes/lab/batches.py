"""Rows as batches, tokenised and collated as TRL does."""

from __future__ import annotations

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from steertune.trainers import Batch, collator, tokenise


def batches(tokenizer: PreTrainedTokenizerBase, data: Dataset, size: int) -> list[Batch]:
    """Pairs or demonstrations, tokenised and collated as TRL does, `size` in a batch."""
    tokenised = tokenise(data, tokenizer)
    collate, rows = collator(tokenised, tokenizer), tokenised.to_list()
    return [Batch.read(collate(rows[i : i + size])) for i in range(0, len(rows), size)]
