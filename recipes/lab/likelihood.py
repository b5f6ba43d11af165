"""Likelihoods of answers under a model, and its log-probabilities of all tokens at their places.

Shapes: T tokens of an answer, L of all answers of a batch, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.scorers import as_rows
from steertune.trainers import Batch, ModelAt, labelled_logits

NEUTRAL_BATCH = 16  # the common prefix of rows is computed once per batch
Row = tuple[str, str]
"""A prompt and an answer."""


@torch.no_grad()
def likelihoods(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row], size: int
) -> dict[Row, tuple[float, int]]:
    """Negative log-likelihood (nats) and number of tokens of every answer that is not empty, `size` rows at a time."""
    different = [row for row in dict.fromkeys(rows) if row[1].strip()]
    values: list[tuple[float, int]] = []
    for batch in batches(tokenizer, as_rows(tokenizer, different), size) if different else []:
        outputs = ModelAt(model, model, batch.to(model.device))(1.0)
        values += zip((-outputs.logps).tolist(), outputs.mask.sum(dim=1).tolist(), strict=True)
    return dict(zip(different, values, strict=True))


def neutral_logps(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Dataset, size: int = NEUTRAL_BATCH
) -> list[tuple[Tensor, Tensor]]:
    """Per neutral answer, log-probabilities of all tokens of the vocabulary, `(T, V)`, and the true tokens, `(T,)`."""
    return answer_logps(model, batches(tokenizer, rows, size))


@torch.no_grad()
def answer_logps(model: Any, shown: Sequence[Batch]) -> list[tuple[Tensor, Tensor]]:
    """Like `neutral_logps`, for rows that are tokenised already."""
    logps = []
    for batch in shown:
        batch = batch.to(model.device)
        # the labels of all rows stand row after row
        logps_LV = F.log_softmax(labelled_logits(model, model, batch), dim=-1).cpu()
        lengths = (batch.labels[:, 1:] != -100).sum(dim=1).tolist()
        logps += zip(logps_LV.split(lengths), batch.answers.cpu().split(lengths), strict=True)
    return logps
