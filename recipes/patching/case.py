"""The transcripts of a patch: catches, innocent traffic, and rows only for tests. All input is checked here."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from steertune.adapters.monitors import check_rate
from steertune.recipes.lab.division import divide
from steertune.recipes.lab.files import ArmError, shown
from steertune.recipes.lab.similarity import Frame, near_texts, text_of, texts, told_apart_by
from steertune.recipes.lab.transcripts import Transcripts, check_apart, read_transcripts

MOST = 16
"""The largest number of catches that a patch is made from."""
SIZES = (1, 4)
"""Smaller numbers of catches from which the fix is also made, to show how it gets worse with fewer."""
CAUGHT, NEAR, FAR = "caught", "near", "far"


@dataclass(frozen=True)
class Case:
    """All transcripts of a patch.

    Attributes:
        groups: Transcripts by group: `caught`, and `near` and `far` if given.
        innocent: Innocent rows that the monitor is fitted on and the fix is regularised with.
        held_out: Innocent rows to measure on.
        sizes: Numbers of catches from which the fix is made; the last one is all of them.

        rate: False-positive rate of the monitor.
        pattern: A regular expression that matches bad answers; None: bad answers are not recognised.
        note: How many rows of each kind there are.
    """

    groups: dict[str, Transcripts]
    innocent: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    sizes: list[int]
    rate: float
    pattern: str | None
    note: str

    @property
    def caught(self) -> Transcripts:
        """The catches."""
        return self.groups[CAUGHT]

    def digest(self) -> str:
        """Identifies the case, so that a run continues only on the same transcripts."""
        given = {name: group.rows.to_list() for name, group in self.groups.items()}
        corrections = {name: group.corrections for name, group in self.groups.items()}
        rest = [self.innocent, self.held_out, self.sizes, self.rate, self.pattern]
        text = json.dumps([given, corrections, *rest], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def pairs(self, group: str) -> list[dict[str, Any]]:
        """The rows of a group that have a correction, as pairs: `prompt`, `chosen`, `rejected`."""
        transcripts = self.groups[group]
        return [
            {"prompt": row["prompt"], "chosen": correction, "rejected": row["completion"]}
            for row, correction in zip(transcripts.rows.to_list(), transcripts.corrections, strict=True)
            if correction is not None
        ]


def read_case(
    caught: str,
    innocent: str | None,
    others: dict[str, str | None],
    chat: Callable[[], bool],
    rate: float,
    sizes: Sequence[int] | None = None,
    pattern: str | None = None,
) -> Case:
    """Read and check all rows.

    Args:
        caught: The file of bad transcripts.
        innocent: The file of innocent traffic.
        others: Files of bad transcripts for tests, or None, by group (`near` and `far`).
        chat: Whether the model has a chat template.
        rate: False-positive rate of the monitor.
        sizes: Further numbers of catches from which the fix is made.
        pattern: A regular expression that matches bad answers.

    Raises:
        ArmError: no or too many catches, no innocent traffic, a catch that is also innocent or test traffic, or a
            pattern that contradicts the transcripts.
        MonitorError: the innocent rows cannot resolve the rate.
    """
    groups = {CAUGHT: read_transcripts(caught, "bad", chat)}
    count = len(groups[CAUGHT])
    if count > MOST:
        raise ArmError(
            f"{caught} has {count} transcripts, but a patch is made from 1 to {MOST}. Give the worst {MOST}, or "
            "train on all of them: steertune train, and steertune monitor."
        )
    if not innocent:
        raise ArmError(
            "There is no innocent traffic, which is needed to measure the harm to benign requests and the monitor's "
            "false positives. Give as many innocent transcripts as you have: --innocent FILE."
        )
    ordinary = read_transcripts(innocent, "innocent", chat)
    groups |= {name: read_transcripts(file, "bad", chat) for name, file in others.items() if file}
    check_distinct(groups[CAUGHT])
    for name, group in groups.items():
        if name != CAUGHT:
            check_apart(groups[CAUGHT], group, f"to test {name}", "catch")
        _check_not_innocent(group, ordinary)
    fitted, held_out = _parts(ordinary.rows.to_list(), innocent)
    check_rate(rate, len(fitted))
    check_pattern(pattern, groups)
    listed = "".join(f", {len(group)} {name} to test on" for name, group in groups.items() if name != CAUGHT)
    note = (
        f"{count} caught{listed}; {len(fitted)} innocent rows to fit on and {len(held_out)} to measure on, "
        "near-duplicates in the same part."
    )
    return Case(groups, fitted, held_out, _sizes(sizes, count), rate, pattern, note)


def _parts(rows: list[dict[str, Any]], innocent: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The innocent rows to fit on, and those to measure on."""
    division = divide(rows, told_apart_by(rows))
    if not division.held_out:
        raise ArmError(
            f"{innocent} has {len(rows)} rows, too few to hold any out: without them the harm to benign requests "
            "cannot be measured. Give 16 different ones or more."
        )
    return [rows[i] for i in division.train], [rows[i] for i in division.held_out]


def check_distinct(caught: Transcripts) -> None:
    """Refuse a catch that occurs twice, since it would count as two.

    Raises:
        ArmError: the message names both places.
    """
    rows = caught.rows.to_list()
    row_texts = texts(rows, "text")
    for i, text in enumerate(row_texts):
        first = row_texts.index(text)
        if first < i:
            raise ArmError(f"{caught.place(i)} is the same as {caught.place(first)}. Remove one of them.")


def _check_not_innocent(bad: Transcripts, innocent: Transcripts) -> None:
    """Refuse a bad row that is also among the innocent ones."""
    bad_texts, others = texts(bad.rows.to_list(), "text"), texts(innocent.rows.to_list(), "text")
    if pairs := near_texts(bad_texts, others, Frame.of(others)):
        first, second = pairs[0]
        raise ArmError(
            f"{bad.place(first)}, a bad transcript, is also in the innocent traffic, or nearly: "
            f"{innocent.place(second)} ({len(pairs)} such pairs). Remove it there."
        )


def _sizes(given: Sequence[int] | None, count: int) -> list[int]:
    if given and max(given) > count:
        raise ArmError(f"--sizes {max(given)}: there are {count} catches. Give numbers from 1 to {count}.")
    return sorted({*(SIZES if given is None else given), count} & {*range(1, count + 1)})


def check_pattern(pattern: str | None, groups: dict[str, Transcripts]) -> None:
    """Refuse a pattern that misses a catch or matches a correction; None means no pattern.

    Raises:
        ArmError: the pattern is wrong or not a regular expression; the message names the transcript.
    """
    if pattern is None:
        return
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ArmError(f"--bad-pattern {shown(pattern)} is not a regular expression: {error}.") from error
    caught = groups[CAUGHT]
    for i, (row, correction) in enumerate(zip(caught.rows.to_list(), caught.corrections, strict=True)):
        answer, corrected = text_of(row["completion"]), text_of(correction)
        if not compiled.search(answer):
            raise ArmError(
                f"--bad-pattern {shown(pattern)} does not find the bad answer of {caught.place(i)}: "
                f"{shown(answer)}. It must find all that were caught, or bad answers would count as harmless."
            )
        if correction is not None and compiled.search(corrected):
            raise ArmError(
                f"--bad-pattern {shown(pattern)} also finds the corrected answer of {caught.place(i)}: "
                f"{shown(corrected)}. It must only find bad answers."
            )


def dataset(rows: Sequence[dict[str, Any]]) -> Dataset:
    """Rows as a data set; without rows it has no columns."""
    return Dataset.from_list([*rows])
