"""What recipes record in a vector's file: its training data, and measurements at several strengths."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset

from steertune.adapters.description import Strength, TrainingData
from steertune.recipes.lab.rows import BASE, Record


def data_of(rows: Dataset, name: str | None = None) -> TrainingData:
    """A record of the training data, with the SHA-256 of its rows in order, each as a line of JSON with sorted keys.

    Args:
        rows: The rows that were passed to the trainer.
        name: The name of the data; of a path, only the last part is recorded.
    """
    digest = hashlib.sha256()
    for row in rows.to_list():
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return TrainingData(digest.hexdigest(), len(rows), None if name is None else Path(name).name)


def strength_of(record: Record) -> Strength:
    """The measurements of a record at every strength; the recommended strength is that of training."""
    means = record.means()
    measured = {"0" if label == BASE else label: _finite(values) for label, values in means.items()}
    return Strength(measured={label: values for label, values in measured.items() if _is_number(label)})


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def _is_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False
