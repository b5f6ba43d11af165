"""A regular expression: 1 where it is found in the answer, else 0."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from pydantic import BaseModel, field_validator

from steertune.recipes.lab.scorers import Scorer


class Options(BaseModel, extra="forbid", strict=True):
    """`pattern`: a regular expression, case-insensitive."""

    pattern: str

    @field_validator("pattern")
    @classmethod
    def _valid(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern


def fit(options: Options, rows: Dataset, model: Any, tokenizer: Any) -> Scorer:
    """Nothing is fitted."""
    found = re.compile(options.pattern, re.IGNORECASE)

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return [float(bool(found.search(answer))) for answer in answers]

    return Scorer(score, f"rule: the answer matches /{options.pattern}/")
