"""Split the rows of a task so that no arm is ever trained on what it is measured on.

Training sets are nested (the first n rows of one shuffle per seed) and shared by all arms, so arms can be compared
pair by pair. Validation, scorer and test rows are the same for every seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from datasets import Dataset
from pydantic import BaseModel, Field

from steertune.recipes.lab.data import shuffled_pairs
from steertune.recipes.lab.division import SMALLEST, divide
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.similarity import By, answered_texts, near_duplicates, overlap
from steertune.recipes.lab.sources import Parts, Reading, find_split, load_parts

NEAR = 0.9


class SplitTable(BaseModel, extra="forbid", strict=True):
    """`[splits]`: the number of rows for each purpose."""

    validation: int = Field(default=24, ge=2)
    test: int = Field(default=40, ge=2)
    scorer: int = Field(default=40, ge=0)
    near_duplicates: float = Field(default=NEAR, gt=0, le=1)
    drop_near_duplicates: bool = False


@dataclass(frozen=True)
class Splits:
    """The parts of one task, which do not share examples.

    Attributes:
        pool: Rows from which training sets are drawn.
        validation: Rows on which settings are chosen.
        scorer: Rows on which the scorer of the behaviour is fitted.
        test: Rows on which results are reported.
        by: What tells the rows apart.
        note: How a single file was divided; empty if there were several.
    """

    pool: Dataset
    validation: Dataset
    scorer: Dataset
    test: Dataset
    by: By = "prompt"
    note: str = ""

    def each(self, change: Callable[[Dataset], Dataset]) -> Splits:
        """The splits with a change made to the rows of every part."""
        parts = {name: change(rows) for name, rows in vars(self).items() if isinstance(rows, Dataset)}
        return replace(self, **parts)

    def train(self, examples: int, seed: int, pairing: str = "own", draw: int = 0) -> Dataset:
        """The first `examples` rows of the pool after shuffling by `seed` and `draw`; smaller sets are subsets of
        larger ones."""
        shuffled = self.pool.shuffle(generator=np.random.default_rng([seed, draw] if draw else seed))
        rows = shuffled.select(range(examples))
        return shuffled_pairs(rows) if pairing == "shuffled" else rows


def load_splits(
    name: str,
    sizes: SplitTable,
    largest: int,
    reverse: bool = False,
    reading: Reading | None = None,
    at_most: bool = False,
) -> Splits:
    """Split a task. If it has no separate validation file, the first rows of its training file are used; scorer rows
    are the next ones. A single file is divided: each part gets a fifth of what is left, 8 rows or more, and `sizes`
    are upper limits.

    Args:
        name: Embedded task, path or Hub name.
        sizes: The number of rows for each purpose.
        largest: Size of the largest training set that will be drawn.
        reverse: Swap chosen and rejected answers.
        reading: What the columns mean.
        at_most: Whether a single file can have fewer training rows than `largest`.

    Raises:
        ArmError: too few rows, no pairs, an unknown column, or a test or validation row that is also (nearly) in
            another split.
    """
    parts = load_parts(name, reading=reading)
    validation_rows = None if parts.division else find_split(name, "validation", reading)
    for rows, split in ((parts.train, "train"), (parts.test, "test"), (validation_rows, "validation")):
        if rows is not None and len(rows) and not {"chosen", "rejected"} <= set(rows.column_names):
            raise ArmError(f"{name!r}: a grid compares preferences, but the {split} rows have {rows.column_names}.")
    splits = _of_one_file(name, parts, sizes) if parts.division else _of_files(name, parts, validation_rows, sizes)
    if len(splits.pool) < largest and not (at_most and parts.division):
        taken = f"{len(splits.scorer)} rows for the scorer"
        taken += "" if validation_rows is not None else f" and {len(splits.validation)} for validation"
        raise ArmError(
            f"{name!r}: {largest} training examples requested, {len(splits.pool)} are left after {taken}. Ask for "
            "fewer."
        )
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    return splits.each(lambda rows: rows.rename_columns(swapped)) if reverse else splits


def _of_files(name: str, parts: Parts, validation_rows: Dataset | None, sizes: SplitTable) -> Splits:
    """The splits of a task with a file for each of training and test."""
    train = parts.train.shuffle(seed=0)
    if validation_rows is None:
        validation, train = _cut(name, "validation", train, sizes.validation)
    else:
        validation, _ = _cut(name, "validation", validation_rows, sizes.validation)
    scorer, pool = _cut(name, "scorer", train, sizes.scorer)
    test, _ = _cut(name, "test", parts.test, sizes.test)
    pool = _apart(name, pool, validation, scorer, test, sizes, parts.by)
    return Splits(pool, validation, scorer, test, parts.by)


def _of_one_file(name: str, parts: Parts, sizes: SplitTable) -> Splits:
    """The splits of a single file: its test rows are those of every other recipe, and the rest is divided again."""
    rest, taken, left_out = parts.train, [], 0
    for what, size in (("validation", sizes.validation), ("scorer", sizes.scorer)):
        division = divide(rest.to_list(), parts.by, what)
        if not len(parts.test) or (size and not division.held_out):
            raise ArmError(
                f"{parts.note} Test, validation{' and scorer' if sizes.scorer else ''} rows are needed besides: "
                f"{SMALLEST} each, and {SMALLEST} to train on. Give more pairs, or a folder with train.jsonl and "
                "test.jsonl."
            )
        if not size:
            taken.append(rest.select([]))
            continue
        taken.append(rest.select(division.held_out[:size]))
        rest, left_out = rest.select(division.train), left_out + len(division.left_out)
    validation, scorer = taken
    test = parts.test.select(range(min(sizes.test, len(parts.test))))
    note = (
        f"{parts.note} Used here: {len(test)} test rows; of the training rows {len(validation)} for validation, "
        f"{len(scorer)} for the scorer, {len(rest)} to train on"
        + (f", {left_out} left out because they resemble two parts." if left_out else ".")
    )
    return Splits(rest, validation, scorer, test, parts.by, note)


def _apart(
    name: str, pool: Dataset, validation: Dataset, scorer: Dataset, test: Dataset, sizes: SplitTable, by: By
) -> Dataset:
    """Refuse rows that are in two splits, compared by prompt and by prompt with answer; with `drop_near_duplicates`,
    drop those of the pool."""
    named = {"train": pool, "validation": validation, "scorer": scorer, "test": test}
    rows = {split: part.to_list() for split, part in named.items()}
    texts = {split: [text for row in part for text in answered_texts(row)] for split, part in rows.items()}
    dropped: set[int] = set()
    for split, other in combinations(rows, 2):
        alike = overlap(rows[split], rows[other], by, sizes.near_duplicates)
        # a row has two texts, one for each answer
        answered = near_duplicates(texts[split], texts[other], sizes.near_duplicates)
        pairs = [*alike, *((i // 2, j // 2) for i, j in answered)]
        if split == "train" and sizes.drop_near_duplicates:
            dropped |= {i for i, _ in pairs}
        elif pairs:
            i, j = pairs[0]
            what = "ask" if alike and by == "prompt" else "say"
            one, two = (answered_texts(row)[0][:120] for row in (rows[split][i], rows[other][j]))
            fix = "splits.drop_near_duplicates = true" if split == "train" else "another file or fewer rows"
            raise ArmError(
                f"{name!r}: a {split} row and a {other} row {what} the same or nearly the same: {one!r} and {two!r}. "
                f"Remove one, or use {fix}."
            )
    return pool.select([i for i in range(len(pool)) if i not in dropped]) if dropped else pool


def _cut(name: str, what: str, rows: Dataset, size: int) -> tuple[Dataset, Dataset]:
    if len(rows) < size:
        raise ArmError(f"{name!r}: splits.{what}={size}, but only {len(rows)} rows exist. Ask for fewer.")
    return rows.select(list(range(size))), rows.select(list(range(size, len(rows))))
