"""A regular expression: 1 if it matches anywhere in the answer, else 0."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from pydantic import BaseModel

from steertune.recipes.lab.scorers import Scorer
from steertune.recipes.lab.tables import Pattern


class Options(BaseModel, extra="forbid", strict=True):
    """`pattern`: a regular expression, case-insensitive."""

    pattern: Pattern


def fit(options: Options, rows: Dataset, model: Any, tokenizer: Any) -> Scorer:
    """The rule as a scorer; nothing is fitted."""
    pattern = re.compile(options.pattern, re.IGNORECASE)

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return [float(bool(pattern.search(answer))) for answer in answers]

    return Scorer(score, f"rule: the answer matches /{options.pattern}/", reads_text_alone=True)
