"""Hashes of an adapter's training rows, saved beside it: enough to refuse these as held-out rows, without their text.

`trained_on.json` has, for every training prompt, a hash of its words and sketches of 512 bits. The share of bits in
which two sketches agree estimates the similarity of their texts (one-bit minwise hashing, Li and König 2010), so
near-duplicates are found too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from steertune.recipes.lab.files import ArmError, read_result, write_result
from steertune.recipes.lab.similarity import LEEWAY, By, Frame, digest, shingles, texts

FILE = "trained_on.json"
_BITS = 512
_NEAR = 0.74
"""A row with at least this estimated similarity counts as a near-duplicate. The estimate has a standard error of 0.03:
it finds 98 of 100 texts with a similarity of 0.8, and takes one of 10 000 with 0.6 for a near-duplicate."""


@dataclass(frozen=True)
class TrainedOn:
    """The rows of one training set.

    Attributes:
        by: What tells the rows apart.
        frame: The words and pairs of words that all of them have in common.
        hashes: A hash of each row's words.
        sketches: Two sketches of each row, as hexadecimal digits: of the whole row, and of the row without the frame.
    """

    by: By
    frame: Frame
    hashes: tuple[str, ...]
    sketches: tuple[str, ...]

    @classmethod
    def of(cls, rows: Dataset, by: By) -> TrainedOn:
        """Hashes and sketches of training rows."""
        words_of_rows = texts(rows.to_list(), by)
        frame = Frame.of(words_of_rows)
        unique = sorted(set(words_of_rows))
        sketches = [_sketches(frame, text).tobytes().hex() for text in unique]
        return cls(by, frame, tuple(map(digest, unique)), tuple(sketches))

    def resembling(self, rows: Sequence[dict[str, Any]]) -> list[int]:
        """Indices of rows that are among the training rows, or near-duplicates of one."""
        words_of_rows = texts(rows, self.by)
        sketches = np.array([_sketches(self.frame, text) for text in words_of_rows])
        theirs = np.array([np.frombuffer(bytes.fromhex(sketch), dtype=np.uint8) for sketch in self.sketches])
        signs, their_signs = (2.0 * np.unpackbits(bits, axis=1).astype(np.float32) - 1 for bits in (sketches, theirs))
        # unrelated sketches agree in half of their bits, so the mean product of their signs is the similarity
        whole: np.ndarray = signs[:, :_BITS] @ their_signs[:, :_BITS].T / _BITS
        rest: np.ndarray = signs[:, _BITS:] @ their_signs[:, _BITS:].T / _BITS
        leeway = LEEWAY if self.frame.hashes else 0.0
        similar = ((whole >= _NEAR) * (rest >= _NEAR - leeway)).max(axis=1).tolist()
        hashes = set(self.hashes)
        return [i for i, text in enumerate(words_of_rows) if similar[i] or digest(text) in hashes]


def sets_of(train: Dataset, by: By, used: Dataset) -> list[TrainedOn]:
    """Hashes of a run's training examples, including new examples made from them. `used` are the rows passed to the
    trainer."""
    return [TrainedOn.of(used if by == "prompt" and len(used) > len(train) else train, by)]


def write(folder: Path, sets: Iterable[TrainedOn]) -> None:
    """Save the hashes of an adapter's training rows in its folder."""
    parts = []
    for one in sets:
        frame = sorted(one.frame.hashes)
        parts.append({"by": one.by, "frame": frame, "hashes": one.hashes, "sketches": one.sketches})
    write_result(folder / FILE, {"format": 1, "sets": parts})


def read(folder: Path) -> list[TrainedOn] | None:
    """The training sets of an adapter, as hashes; None if its folder has no such file.

    Raises:
        ArmError: the file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    fix = "Delete it; held-out rows can then not be checked against training rows."
    try:
        parts = read_result(file, fix)["sets"]
        return [
            TrainedOn(
                part["by"],
                Frame(frozenset(part["frame"])),
                tuple(part["hashes"]),
                tuple(part["sketches"]),
            )
            for part in parts
        ]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ArmError(f"{file} is damaged ({error!r}). {fix}") from error


def resembling(sets: Iterable[TrainedOn], rows: Dataset) -> list[int]:
    """Indices of rows that are in one of the training sets, or resemble one of their rows."""
    given = rows.to_list()
    return sorted({i for one in sets if one.hashes and given for i in one.resembling(given)})


def _sketches(frame: Frame, text: tuple[str, ...]) -> np.ndarray:
    """The sketches of a text and of the text without the frame, `(128,)` bytes."""
    return np.concatenate([_sketch(shingles(text)), _sketch(frame.rest(text))])


def _sketch(parts: frozenset[str]) -> np.ndarray:
    """One bit of the smallest of each of 512 hashes of a set's members, `(64,)` bytes."""
    if not parts:
        return np.zeros(_BITS // 8, dtype=np.uint8)
    hashes_S = np.array([_number(part) for part in sorted(parts)], dtype=np.uint64)
    factors_K, offsets_K = _constants()
    mixed_SK = (hashes_S[:, None] ^ offsets_K) * factors_K
    mixed_SK = (mixed_SK ^ (mixed_SK >> np.uint64(29))) * factors_K
    smallest_K = (mixed_SK ^ (mixed_SK >> np.uint64(32))).min(axis=0)
    return np.packbits((smallest_K & np.uint64(1)).astype(np.uint8))


@cache
def _constants() -> tuple[np.ndarray, np.ndarray]:
    """Odd factors and offsets of the 512 hashes, `(512,)` each."""
    numbers = np.array([_number(f"sketch {i}") for i in range(2 * _BITS)], dtype=np.uint64)
    return numbers[:_BITS] | np.uint64(1), numbers[_BITS:]


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")
