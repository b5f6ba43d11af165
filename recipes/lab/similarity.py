"""Which rows ask the same, or nearly the same.

Two texts are compared by their words and pairs of neighbouring words, as sets A and B: their similarity is the Jaccard
index |A and B| / |A or B|. Case, punctuation and white space do not count. Texts with different numbers are different,
however long the rest is: "Question 12" is not a copy of "Question 13". The similarity of two texts depends on these
two alone, so rows that are added to a file change nothing between the others.

What all prompts of a file begin or end with, such as "Is the following statement something you would say?", tells no
two of them apart, and is left out (`Frame`).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from scipy.sparse import csr_matrix

NEAR = 0.8
"""From this similarity on, two prompts are near-duplicates."""
By = Literal["prompt", "text"]
"""What tells rows apart: their prompts, or prompts and answers where all prompts are the same or there are none."""

_ALONE = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # scripts without spaces: one word a character
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")
_FRAME_ROWS = 16
_BLOCK = 256  # rows that are compared with all others at a time
_PAIRS = 200_000  # pairs whose similarity is computed at a time


def words(text: str) -> tuple[str, ...]:
    """The words of a text, without case and punctuation; a text without any is its own word."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return tuple(_WORD.findall(plain)) or tuple(plain.split())


def text_of(value: Any) -> str:
    """All text of a prompt or an answer: of a string, of messages, or of the parts of one message."""
    if isinstance(value, list):
        return " ".join(text_of(part.get("content") or part.get("text")) for part in value)
    return "" if value is None else str(value)


def told_apart_by(rows: Sequence[dict[str, Any]], own_prompts: bool = True) -> By:
    """What tells rows apart.

    Args:
        rows: The rows.
        own_prompts: Whether the prompts stand in the data, and are not the shared beginning of two texts.
    """
    if not own_prompts or any("prompt" not in row for row in rows):
        return "text"
    return "text" if len(rows) > 1 and len({words(text_of(row["prompt"])) for row in rows}) == 1 else "prompt"


def texts(rows: Sequence[dict[str, Any]], by: By) -> list[tuple[str, ...]]:
    """The words by which each row is compared with others."""
    columns = ("prompt",) if by == "prompt" else ("prompt", "chosen", "rejected", "completion", "messages", "text")
    return [words(" ".join(text_of(row.get(column)) for column in columns)) for row in rows]


@dataclass(frozen=True)
class Frame:
    """The words that the texts of a file have in common at both ends, as numbers and hashes.

    Attributes:
        head: How many words they begin with, and the hash of these.
        tail: How many they end with, and the hash of these.
    """

    head: tuple[int, str] = (0, "")
    tail: tuple[int, str] = (0, "")

    @classmethod
    def of(cls, given: Sequence[tuple[str, ...]]) -> Frame:
        """The frame of the first rows, so that rows added behind them do not change it."""
        first = list(dict.fromkeys(given[:_FRAME_ROWS]))
        if len(first) < 2:
            return cls()
        head = _common(first)
        tail = _common([text[head:][::-1] for text in first])
        one = first[0]
        return cls((head, digest(one[:head])), (tail, digest(one[len(one) - tail :])))

    def inside(self, text: tuple[str, ...]) -> tuple[str, ...]:
        """A text without the frame; the whole text, where nothing else is left of it."""
        (head, begins), (tail, ends) = self.head, self.tail
        start = head if head and digest(text[:head]) == begins else 0
        end = len(text) - (tail if tail and digest(text[len(text) - tail :]) == ends else 0)
        return text[start:end] or text


def shingles(text: tuple[str, ...]) -> frozenset[str]:
    """The words of a text and its pairs of neighbouring words, each with the text's numbers."""
    numbers = " ".join(word for word in text if any(map(str.isdigit, word)))
    pairs = (f"{first} {second}" for first, second in pairwise(text))
    return frozenset(f"{numbers}|{part}" for part in (*text, *pairs))


def digest(text: tuple[str, ...]) -> str:
    """A hash of a text's words: the same in every process and on every machine."""
    return hashlib.blake2b(" ".join(text).encode("utf-8", "replace"), digest_size=8).hexdigest()


def near_pairs(
    first: Sequence[frozenset[str]], second: Sequence[frozenset[str]], near: float = NEAR
) -> list[tuple[int, int]]:
    """Pairs (index in first, index in second) with a similarity of at least `near`.

    Exact. Two sets that are so similar share one of their rarest members, so only those that do are compared
    (prefix filtering, Bayardo et al. 2007).
    """
    if not first or not second:
        return []
    count = Counter(part for parts in (*first, *second) for part in parts)
    order = {part: i for i, part in enumerate(sorted(count, key=lambda part: (count[part], part)))}
    (A, rare_A), (B, rare_B) = (_matrices(side, order, near) for side in (first, second))
    sizes_A, sizes_B = (np.array([len(parts) for parts in side]) for side in (first, second))
    found: list[tuple[int, int]] = []
    for start in range(0, len(first), _BLOCK):
        candidates = (rare_A[start : start + _BLOCK] @ rare_B.T).tocoo()
        i, j = candidates.row + start, candidates.col
        alike = np.minimum(sizes_A[i], sizes_B[j]) >= near * np.maximum(sizes_A[i], sizes_B[j]) - 1e-9
        i, j = i[alike], j[alike]
        for at in range(0, len(i), _PAIRS):
            own, other = i[at : at + _PAIRS], j[at : at + _PAIRS]
            shared = np.asarray(A[own].multiply(B[other]).sum(axis=1)).ravel()
            similar = shared >= near * (sizes_A[own] + sizes_B[other] - shared) - 1e-9
            found += zip(own[similar].tolist(), other[similar].tolist(), strict=True)
    return sorted(found)


def overlap(
    train: Sequence[dict[str, Any]], test: Sequence[dict[str, Any]], by: By, near: float = NEAR
) -> list[tuple[int, int]]:
    """Pairs (index of a training row, index of a test row) that ask the same, or nearly the same."""
    own, others = texts(train, by), texts(test, by)
    frame = Frame.of(own)
    first, second = ([shingles(frame.inside(text)) for text in side] for side in (own, others))
    return near_pairs(first, second, near)


def _matrices(sets: Sequence[frozenset[str]], order: dict[str, int], near: float) -> tuple[csr_matrix, csr_matrix]:
    """Rows of ones at the members of each set, and at its rarest members only."""
    columns = [sorted(order[part] for part in parts) for parts in sets]
    rarest = [row[: len(row) - int(np.ceil(near * len(row) - 1e-9)) + 1] for row in columns]
    whole, rare = (_ones(rows, len(order)) for rows in (columns, rarest))
    return whole, rare


def _ones(rows: Sequence[Sequence[int]], width: int) -> csr_matrix:
    ends = np.cumsum([0, *map(len, rows)])
    return csr_matrix((np.ones(ends[-1], dtype=np.int32), np.concatenate([np.array(r, int) for r in rows]), ends),
                      shape=(len(rows), width))  # fmt: skip


def _common(given: Sequence[tuple[str, ...]]) -> int:
    """How many words all texts begin with."""
    count = 0
    for together in zip(*given, strict=False):
        if len(set(together)) > 1:
            break
        count += 1
    return count
