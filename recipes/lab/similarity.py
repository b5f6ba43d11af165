"""Find rows that ask the same, or nearly the same.

Two texts are compared by their words and pairs of neighbouring words, as sets A and B: their similarity is the Jaccard
index |A and B| / |A or B|. Case, punctuation and white space do not count. Texts with different numbers are different,
however long the rest is: "Question 12" is not a copy of "Question 13". The similarity of two texts depends on these
two alone, so adding rows to a file does not change it.

Text that all prompts of a file share, such as "Is the following statement something you would say?", does not tell
them apart: near-duplicates must also be alike without it (`Frame`).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from scipy.sparse import csr_matrix

NEAR = 0.8
"""Two prompts with at least this similarity are near-duplicates."""
LEEWAY = 0.3
"""Two near-duplicates can be less similar by this much without the text that all prompts of their file share."""
By = Literal["prompt", "text"]
"""What tells rows apart: their prompts, or prompts and answers where all prompts are the same or there are none."""

_ALONE = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # scripts without spaces: one word a character
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")
_TEXTS = ("prompt", "chosen", "rejected", "completion", "messages", "conversations", "text")
_FRAME_ROWS = 16
_BLOCK = 256  # rows that are compared with all others at a time
_PAIRS = 200_000  # pairs whose similarity is computed at a time


def words(text: str) -> tuple[str, ...]:
    """The words of a text, without case and punctuation; a text without words is split at white space."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return tuple(_WORD.findall(plain)) or tuple(plain.split())


def text_of(value: Any) -> str:
    """All text of a prompt or an answer: of a string, of messages, or of the parts of one message."""
    if isinstance(value, list):
        return " ".join(text_of(part.get("content") or part.get("text") or part.get("value")) for part in value)
    return "" if value is None else str(value)


def told_apart_by(rows: Sequence[dict[str, Any]], own_prompts: bool = True) -> By:
    """What tells rows apart. `own_prompts`: the prompts are in the data, and not the common beginning of two texts."""
    if not own_prompts or any("prompt" not in row for row in rows):
        return "text"
    return "text" if len(rows) > 1 and len({words(text_of(row["prompt"])) for row in rows}) == 1 else "prompt"


def texts(rows: Sequence[dict[str, Any]], by: By) -> list[tuple[str, ...]]:
    """The words by which each row is compared with others."""
    columns = ("prompt",) if by == "prompt" else _TEXTS
    return [words(" ".join(text_of(row.get(column)) for column in columns)) for row in rows]


@dataclass(frozen=True)
class Frame:
    """The words and pairs of words that all texts of a file have in common.

    Attributes:
        hashes: A hash of each with 16 bits: enough to leave it out, too few to recover it.
    """

    hashes: frozenset[str] = frozenset()

    @classmethod
    def of(cls, given: Sequence[tuple[str, ...]]) -> Frame:
        """The frame of the first rows, so that it does not change when rows are appended."""
        first = list(dict.fromkeys(given[:_FRAME_ROWS]))
        if len(first) < _FRAME_ROWS // 2:
            return cls()
        return cls(frozenset(map(_short, frozenset.intersection(*map(_parts, first)))))

    def rest(self, text: tuple[str, ...]) -> frozenset[str]:
        """The shingles of a text without the frame; all of them if nothing would be left."""
        parts = _parts(text)
        return _numbered(text, frozenset(part for part in parts if _short(part) not in self.hashes) or parts)


def shingles(text: tuple[str, ...]) -> frozenset[str]:
    """The words of a text and its pairs of neighbouring words, each with the text's numbers."""
    return _numbered(text, _parts(text))


def _parts(text: tuple[str, ...]) -> frozenset[str]:
    return frozenset([*text, *(f"{first} {second}" for first, second in pairwise(text))])


def _numbered(text: tuple[str, ...], parts: frozenset[str]) -> frozenset[str]:
    numbers = " ".join(word for word in text if any(map(str.isdigit, word)))
    return frozenset(f"{numbers}|{part}" for part in parts)


@cache
def _short(part: str) -> str:
    return digest((part,))[:4]


def digest(text: tuple[str, ...]) -> str:
    """A hash of a text's words: the same in every process and on every machine."""
    return hashlib.blake2b(" ".join(text).encode("utf-8", "replace"), digest_size=8).hexdigest()


def near_pairs(
    first: Sequence[frozenset[str]], second: Sequence[frozenset[str]], near: float = NEAR
) -> list[tuple[int, int]]:
    """Pairs (index in first, index in second) with a similarity of at least `near`.

    The result is exact: two sets with this similarity share one of their rarest members, so only such sets are
    compared (prefix filtering, Bayardo et al. 2007).
    """
    if not first or not second:
        return []
    count = Counter(part for parts in (*first, *second) for part in parts)
    order = {part: i for i, part in enumerate(sorted(count, key=lambda part: (count[part], part)))}
    (A, rare_A), (B, rare_B) = (_matrices(side, order, near) for side in (first, second))
    sizes_A, sizes_B = (np.array([len(parts) for parts in side]) for side in (first, second))
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(first), _BLOCK):
        candidates = (rare_A[start : start + _BLOCK] @ rare_B.T).tocoo()
        i, j = candidates.row + start, candidates.col
        alike = np.minimum(sizes_A[i], sizes_B[j]) >= near * np.maximum(sizes_A[i], sizes_B[j]) - 1e-9
        i, j = i[alike], j[alike]
        for at in range(0, len(i), _PAIRS):
            rows_A, rows_B = i[at : at + _PAIRS], j[at : at + _PAIRS]
            shared = np.asarray(A[rows_A].multiply(B[rows_B]).sum(axis=1)).ravel()
            similar = shared >= near * (sizes_A[rows_A] + sizes_B[rows_B] - shared) - 1e-9
            pairs += zip(rows_A[similar].tolist(), rows_B[similar].tolist(), strict=True)
    return sorted(pairs)


def near_texts(
    first: Sequence[tuple[str, ...]], second: Sequence[tuple[str, ...]], frame: Frame, near: float = NEAR
) -> list[tuple[int, int]]:
    """Pairs (index in first, index in second) of texts with a similarity of at least `near`; without their frame they
    may differ by `LEEWAY` more, since less is left of them."""
    rest, other_rest = ([frame.rest(text) for text in side] for side in (first, second))
    pairs = near_pairs(rest, other_rest, max(near - LEEWAY, 0.05) if frame.hashes else near)
    if not frame.hashes:
        return pairs
    parts, others = ([shingles(text) for text in side] for side in (first, second))
    return [(i, j) for i, j in pairs if len(parts[i] & others[j]) >= near * len(parts[i] | others[j]) - 1e-9]


def near_duplicates(first: Sequence[str], second: Sequence[str], near: float = NEAR) -> list[tuple[int, int]]:
    """Pairs (index in first, index in second) of texts that are the same or nearly the same; text that all of `second`
    share counts less."""
    A, B = [words(text) for text in first], [words(text) for text in second]
    return near_texts(A, B, Frame.of(B), near)


def answered_texts(row: dict[str, Any]) -> list[str]:
    """The prompt of a row with each of its answers."""
    prompt = text_of(row.get("prompt"))
    return [f"{prompt} {text_of(row[side])}" for side in ("chosen", "rejected", "completion") if side in row]


def overlap(
    train: Sequence[dict[str, Any]], test: Sequence[dict[str, Any]], by: By, near: float = NEAR
) -> list[tuple[int, int]]:
    """Pairs (index of a training row, index of a test row) that ask the same, or nearly the same."""
    of_train, of_test = texts(train, by), texts(test, by)
    return near_texts(of_train, of_test, Frame.of(of_train), near)


def _matrices(sets: Sequence[frozenset[str]], order: dict[str, int], near: float) -> tuple[csr_matrix, csr_matrix]:
    """Rows of ones at the members of each set, and at its rarest members only."""
    columns = [sorted(order[part] for part in parts) for parts in sets]
    rarest = [row[: len(row) - int(np.ceil(near * len(row) - 1e-9)) + 1] for row in columns]
    matrices = []
    for rows in (columns, rarest):
        ends = np.cumsum([0, *map(len, rows)])
        ones, places = np.ones(ends[-1], dtype=np.int32), np.concatenate([np.array(row, int) for row in rows])
        matrices.append(csr_matrix((ones, places, ends), shape=(len(rows), len(order))))
    return matrices[0], matrices[1]
