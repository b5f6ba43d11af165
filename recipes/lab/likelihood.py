"""How likely a model finds answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.scorers import as_rows
from steertune.trainers import ModelAt

Row = tuple[str, str]
"""A prompt and an answer."""


@torch.no_grad()
def likelihoods(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row], size: int
) -> dict[Row, tuple[float, int]]:
    """Negative log-likelihood (nats) and tokens of every answer, but for empty ones; `size` is the rows of a pass."""
    different = [row for row in dict.fromkeys(rows) if row[1].strip()]
    values: list[tuple[float, int]] = []
    for batch in batches(tokenizer, as_rows(tokenizer, different), size) if different else []:
        outputs = ModelAt(model, model, batch.to(model.device))(1.0)
        values += zip((-outputs.logps).tolist(), outputs.mask.sum(dim=1).tolist(), strict=True)
    return dict(zip(different, values, strict=True))
