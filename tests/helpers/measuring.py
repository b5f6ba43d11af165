"""Measures of a model on rows, by the way that all recipes take."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from numpy.typing import NDArray

from steertune.recipes.lab.evaluate import evaluate
from steertune.recipes.lab.measures import Seen
from steertune.recipes.lab.observe import HeldOut


def margins(model: Any, tokenizer: Any, pairs: Dataset, strength: float = 1.0) -> NDArray[Any]:
    """`log p(chosen) - log p(rejected)` of every pair, in nats, `(pairs,)`."""
    held_out = HeldOut(model, tokenizer, pairs=pairs, neutral=pairs.select([]))
    return Seen(evaluate(model, held_out, ["margin"], {"at": strength})["at"])["margin"]
