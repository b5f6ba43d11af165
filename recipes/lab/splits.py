"""The rows of a task, split so that no arm ever sees what it is measured on.

Training sets are nested (the first n rows of one shuffle per seed) and shared by all arms, so arms can be compared
pair by pair. Validation, scorer and test rows are the same for every seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from string import Formatter
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from pydantic import BaseModel, Field
from sklearn.feature_extraction.text import TfidfVectorizer

from steertune.recipes.lab.data import find_split, load_split, shuffled_pairs
from steertune.recipes.lab.files import ArmError

NEAR = 0.9


class SplitTable(BaseModel, extra="forbid", strict=True):
    """`[splits]`: how many rows for what."""

    validation: int = Field(default=24, ge=2)
    test: int = Field(default=40, ge=2)
    scorer: int = Field(default=40, ge=0)
    near_duplicates: float = Field(default=NEAR, gt=0, le=1)
    drop_near_duplicates: bool = False


@dataclass(frozen=True)
class Splits:
    """Rows of one task that share no example.

    Attributes:
        pool: What training sets are drawn from.
        validation: What settings are chosen on.
        scorer: What the scorer of the behaviour is fitted on.
        test: What is reported.
    """

    pool: Dataset
    validation: Dataset
    scorer: Dataset
    test: Dataset

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
    columns: Mapping[Literal["prompt", "chosen", "rejected"], str] | None = None,
) -> Splits:
    """Split a task. Where it has no file of its own for validation, the first rows of its training file are used;
    scorer rows are the next ones.

    Args:
        name: Embedded task, path or Hub name.
        sizes: How many rows for what.
        largest: The largest training set that will be asked for.
        reverse: Swap chosen and rejected answers.
        columns: What prompt, chosen and rejected say, with `{column}` for a row's text; None: the rows are pairs.

    Raises:
        ArmError: too few rows, no pairs, an unknown column,
            or a test or validation row that stands (nearly) in another split.
    """
    train, test = load_split(name, "train"), load_split(name, "test")
    own = find_split(name, "validation")
    if columns:
        train, test, own = (None if rows is None else _as_pairs(name, rows, columns) for rows in (train, test, own))
        assert train is not None and test is not None
    for rows, split in ((train, "train"), (test, "test"), (own, "validation")):
        if rows is not None and not {"chosen", "rejected"} <= set(rows.column_names):
            raise ArmError(f"{name!r}: a grid compares preferences, its {split} rows have {rows.column_names}.")
    train = train.shuffle(seed=0)
    if own is None:
        validation, train = _cut(name, "validation", train, sizes.validation)
    else:
        validation, _ = _cut(name, "validation", own, sizes.validation)
    scorer, pool = _cut(name, "scorer", train, sizes.scorer)
    test, _ = _cut(name, "test", test, sizes.test)
    pool = _apart(name, pool, validation, scorer, test, sizes)
    if len(pool) < largest:
        raise ArmError(
            f"{name!r}: {largest} training examples asked, {len(pool)} are left after {len(scorer)} rows for the "
            f"scorer{'' if own is not None else f' and {len(validation)} for validation'}. Ask for fewer."
        )
    splits = Splits(pool, validation, scorer, test)
    return _reversed(splits) if reverse else splits


def near_duplicates(first: Sequence[str], second: Sequence[str], threshold: float) -> list[tuple[int, int, float]]:
    """Pairs (index in first, index in second, similarity) whose TF-IDF vectors over words and word pairs have a
    cosine of at least `threshold`; 1 for the same words in the same order."""
    if not first or not second:
        return []
    vectors = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\S+", sublinear_tf=True)
    vectors.fit([*first, *second])
    similarity = vectors.transform(first) @ vectors.transform(second).T
    found = similarity.tocoo()
    return sorted(
        (int(i), int(j), float(value))
        for i, j, value in zip(found.row, found.col, found.data, strict=True)
        if value >= threshold - 1e-9
    )


def texts_of(row: dict[str, Any]) -> list[str]:
    """Prompt and chosen answer of a pair, and prompt and rejected answer, as plain text."""
    prompt = [json.dumps(row["prompt"], sort_keys=True)] if "prompt" in row else []
    return [" ".join([*prompt, json.dumps(row[side], sort_keys=True)]) for side in ("chosen", "rejected")]


def _as_pairs(name: str, rows: Dataset, columns: Mapping[Literal["prompt", "chosen", "rejected"], str]) -> Dataset:
    """Conversational pairs whose sides are filled in from the rows' own columns."""
    where = f"{name!r}: columns {dict(columns)} cannot be filled in"
    try:
        fields = {
            field for text in columns.values() for _, field, _, _ in Formatter().parse(text) if field is not None
        }
    except ValueError as error:
        raise ArmError(f"{where} ({error}). Its rows have {rows.column_names}.") from error
    if unknown := sorted(fields - set(rows.column_names)):  # an attribute of one is none either
        raise ArmError(f"{where} ({unknown}). Its rows have {rows.column_names}.")

    def fill(row: dict[str, Any]) -> dict[str, Any]:
        texts = {k: v[0] if isinstance(v, list) and v else v for k, v in row.items()}
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        return {k: [{"role": roles[k], "content": text.format_map(texts)}] for k, text in columns.items()}

    return rows.map(fill, remove_columns=rows.column_names)


def _apart(
    name: str, pool: Dataset, validation: Dataset, scorer: Dataset, test: Dataset, sizes: SplitTable
) -> Dataset:
    """Refuse rows that stand in two splits; with `drop_near_duplicates`, drop those of the pool."""
    named = {"train": pool, "validation": validation, "scorer": scorer, "test": test}
    texts = {split: [text for row in rows for text in texts_of(dict(row))] for split, rows in named.items()}
    dropped: set[int] = set()
    for split, other in combinations(named, 2):
        for i, j, similarity in near_duplicates(texts[split], texts[other], sizes.near_duplicates):
            if split == "train" and sizes.drop_near_duplicates:
                dropped.add(i // 2)  # of a row's two texts
                continue
            kind = "the same" if similarity > 1 - 1e-6 else f"nearly the same (similarity {similarity:.2f})"
            fix = "splits.drop_near_duplicates = true" if split == "train" else "another file or fewer rows"
            raise ArmError(
                f"{name!r}: a {split} row and a {other} row are {kind}: {texts[split][i][:120]!r} and "
                f"{texts[other][j][:120]!r}. Remove one, or use {fix}."
            )
    return pool.select([i for i in range(len(pool)) if i not in dropped]) if dropped else pool


def _cut(name: str, what: str, rows: Dataset, size: int) -> tuple[Dataset, Dataset]:
    if len(rows) < size:
        raise ArmError(f"{name!r}: splits.{what}={size}, but only {len(rows)} rows are there. Ask for fewer.")
    return rows.select(list(range(size))), rows.select(list(range(size, len(rows))))


def _reversed(splits: Splits) -> Splits:
    def swap(rows: Dataset) -> Dataset:
        return rows.rename_columns({"chosen": "rejected", "rejected": "chosen"})

    return Splits(swap(splits.pool), swap(splits.validation), swap(splits.scorer), swap(splits.test))
