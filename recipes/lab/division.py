"""Divide a single file of data into training rows and held-out rows.

Which part a row belongs to is decided by a hash of its prompt, so it is the same for every arm, every recipe and every
later run, on every machine, and does not change when rows are appended. Near-duplicates share a part, that of the
first of them in the file; a row that resembles rows of both parts is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steertune.recipes.lab.similarity import NEAR, By, Frame, digest, near_texts, texts

SHARE, SMALLEST = 0.2, 8
"""The held-out part has this share of the rows, but at least this many; at least as many are left to train on."""


@dataclass(frozen=True)
class Division:
    """Indices of the rows of each part.

    Attributes:
        held_out: Rows to measure on; empty if there are too few rows.
        left_out: Rows that resemble rows of both parts.
    """

    train: list[int]
    held_out: list[int]
    left_out: list[int]

    def note(self, name: str, by: By) -> str:
        """How many rows each part has, and how the split was made, in words."""
        rows = len(self.train) + len(self.held_out) + len(self.left_out)
        if not self.held_out:
            return (
                f"`{name}` is one file of {rows} rows, too few to hold any out: {2 * SMALLEST} that are no "
                "near-duplicates of each other are needed. All rows are for training, so nothing is measured on "
                "held-out rows."
            )
        what = "prompt" if by == "prompt" else "text"
        count = len(self.left_out)
        left_out = f" {count} rows that resemble rows of both parts are left out." if count else ""
        return (
            f"`{name}` is one file of {rows} rows, divided by a hash of the {what}: {len(self.train)} training rows "
            f"and {len(self.held_out)} held-out rows, near-duplicates in the same part.{left_out}"
        )


def divide(rows: Sequence[dict[str, Any]], by: By, salt: str = "", near: float = NEAR) -> Division:
    """Divide rows into two parts. `by` is what tells rows apart; another `salt` gives an independent division."""
    of_rows = texts(rows, by)
    frame = Frame.of(of_rows)
    unique = {text: i for i, text in reversed([*enumerate(of_rows)])}  # text -> the first row that has it
    firsts = sorted(unique.values())
    earlier: dict[int, list[int]] = defaultdict(list)
    distinct = [of_rows[i] for i in firsts]
    for one, other in near_texts(distinct, distinct, frame, near):
        if one < other:
            earlier[firsts[other]].append(firsts[one])
    place = [int(digest((salt, *text)), 16) for text in of_rows]  # uniform below 2^64

    def parts(threshold: int) -> Division:
        """The division that holds out rows below a threshold, unless an earlier near-duplicate decides for them."""
        part: dict[int, bool | None] = {}
        for i in firsts:
            decided = {part[k] for k in earlier[i]} - {None}
            part[i] = (decided.pop() if decided else place[i] < threshold) if len(decided) < 2 else None
        of_row = [part[unique[text]] for text in of_rows]
        return Division(*([i for i, value in enumerate(of_row) if value is kind] for kind in (False, True, None)))

    # with few rows, those with the next hashes are held out too
    share = int(SHARE * 2**64)
    division = parts(share)
    for following in sorted(place[i] for i in firsts if place[i] >= share):
        if len(division.held_out) >= SMALLEST:
            break
        division = parts(following + 1)
    enough = min(len(division.train), len(division.held_out)) >= SMALLEST
    return division if enough else Division([*range(len(rows))], [], [])
