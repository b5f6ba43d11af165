"""Bad and innocent transcripts, divided into rows for fitting monitors and rows for testing them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from steertune.adapters.monitors import check_rate
from steertune.recipes.lab.division import divide
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.similarity import told_apart_by
from steertune.recipes.lab.transcripts import Transcripts, check_apart


@dataclass(frozen=True)
class Labelled:
    """Rows with `prompt` and `completion`, and whether each is bad, `(rows,)`."""

    rows: list[dict[str, Any]]
    bad: NDArray[np.bool_]

    @classmethod
    def of(cls, parts: Sequence[Transcripts], corrections: bool = True) -> Labelled:
        """All rows of some files; corrected answers count as innocent rows."""
        rows = [dict(row) for part in parts for row in part.rows.to_list()]
        bad = [value for part in parts for value in part.bad]
        if corrections:
            corrected = [
                {"prompt": row["prompt"], "completion": correction}
                for part in parts
                for row, correction in zip(part.rows.to_list(), part.corrections, strict=True)
                if correction is not None
            ]
            rows, bad = rows + corrected, bad + [False] * len(corrected)
        return cls(rows, np.array(bad, dtype=bool))

    def select(self, indices: Sequence[int]) -> Labelled:
        """Some of the rows."""
        return Labelled([self.rows[i] for i in indices], self.bad[list(indices)])

    def __add__(self, other: Labelled) -> Labelled:
        return Labelled(self.rows + other.rows, np.concatenate([self.bad, other.bad]))

    def dataset(self) -> Dataset:
        """The rows as a data set."""
        return Dataset.from_list(self.rows)

    def count(self) -> str:
        """The number of rows of each kind, as text."""
        return f"{int(self.bad.sum())} bad and {int((~self.bad).sum())} innocent rows"


@dataclass(frozen=True)
class Samples:
    """The rows for fitting and testing monitors.

    Attributes:
        train: Rows to fit and to choose on.
        test: Rows to test on; those of test files come last.
        held_out: How many of the test rows come from the divided files.
        note: How many rows each part has, and how they were divided.
    """

    train: Labelled
    test: Labelled
    held_out: int
    note: str


def gather(parts: Sequence[Transcripts], tests: Sequence[Transcripts], rate: float) -> Samples:
    """Divide transcripts by a hash of the prompt, near-duplicates together; all rows of test files are test rows.

    Args:
        parts: Files whose rows are divided.
        tests: Files to test on.
        rate: False-positive rate that the innocent training rows must resolve.

    Raises:
        ArmError: no row is bad, or none is innocent; a row of a test file resembles a row that is divided.
        MonitorError: the innocent training rows are too few for the rate.
    """
    for test in tests:
        for part in parts:
            check_apart(part, test, "a row to test on")
    whole = Labelled.of(parts)
    if not whole.bad.any():
        raise ArmError("No row is bad. Give at least one bad transcript.")
    if whole.bad.all():
        raise ArmError(
            "There is no innocent traffic for a monitor to compare with. Give as many innocent transcripts as you "
            "have: --innocent FILE."
        )
    by = told_apart_by(whole.rows)
    division = divide(whole.rows, by)
    train, test = whole.select(division.train), whole.select(division.held_out)
    if not train.bad.any():  # with few rows, the hash may hold out all bad ones
        train, test = (
            train + test.select(np.flatnonzero(test.bad).tolist()),
            test.select(np.flatnonzero(~test.bad).tolist()),
        )
    check_rate(rate, int((~train.bad).sum()))
    held_out = len(test.rows)
    for extra in tests:
        test = test + Labelled.of([extra])
    what = "prompt" if by == "prompt" else "text"
    count = len(division.left_out)
    left = f", {count} rows that resemble rows of both parts are left out" if count else ""
    note = (
        f"Fitted and chosen on {train.count()}, tested on {test.count()}. Rows are divided by a hash of the {what}, "
        f"near-duplicates in the same part{left}."
    )
    return Samples(train, test, held_out, note)
