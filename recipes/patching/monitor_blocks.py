"""Blocks of a patch's page about its monitor."""

from __future__ import annotations

import numpy as np
import pandas as pd

from steertune.recipes.lab.detection import share
from steertune.recipes.lab.intervals import Interval
from steertune.recipes.lab.pages import Block, Section, Table, Text, escape
from steertune.recipes.lab.pages.side_effects import with_ends
from steertune.recipes.lab.rows import BASE
from steertune.recipes.lab.similarity import text_of
from steertune.recipes.patching.case import Case
from steertune.recipes.patching.cell import FIXED, Cell, flags, not_found

_DETECTORS = {
    "base": "the monitor, of the model as it was",
    "fixed": "the monitor, of the fixed model",
    "old monitor on fixed": "the monitor fitted before the fix, of the fixed model",
    "text": "TF-IDF",
}


def monitor_line(cell: Cell) -> str:
    """A sentence on how many bad transcripts the monitor flags that are not catches."""
    groups = cell.watched["groups"]
    if not groups:
        return "No bad transcripts but the catches were given (`--near`, `--far`): the monitor is not tested on any."
    parts = []
    for name, seen in groups.items():
        recall = seen["fixed"]["recall"]
        parts.append(f"{recall['estimate'] * recall['pairs']:.0f} of {recall['pairs']} {name} bad transcripts")
    return f"The monitor flags {' and '.join(parts)}, which were not caught."


def monitor_blocks(case: Case, cell: Cell) -> list[Block]:
    """What the monitor reads, what it detects, and which generated answers it flags."""
    watched = cell.watched
    where = (
        f"It reads layer {watched['layer']}, below everything that the fix changes: a text has the same score at "
        "every strength, and the threshold holds at all of them."
        if watched["below"]
        else f"It reads layer {watched['layer']} of the fixed model at strength 1. At another strength, or without "
        "the fix, its threshold does not hold."
    )
    flagged = {kind: share(np.array(one["scores"]) > one["threshold"]) for kind, one in watched["innocent"].items()}
    rows = []
    kinds = [kind for kind in _DETECTORS if not (watched["below"] and kind in ("base", "old monitor on fixed"))]
    for name, seen in watched["groups"].items():
        for kind in kinds:
            called = watched["text"] if kind == "text" else _DETECTORS[kind]
            intervals = [Interval(**seen[kind][key]) for key in ("auroc", "recall")]
            rows.append([name, called, *map(with_ends, intervals), with_ends(flagged[kind])])
    columns = ["bad transcripts", "read by", "AUROC", "recall", "innocent rows flagged"]
    text = (
        f"A threshold for a false-positive rate of {case.rate:g}, chosen on innocent rows that it was not fitted on; "
        f"layer chosen by {watched['chosen_by']}. {where}"
    )
    blocks: list[Block] = [Text(text)]
    if rows:
        blocks.append(Table(pd.DataFrame(rows, columns=pd.Index(columns)), "monitor"))
    else:
        blocks.append(Text(f"Held-out innocent rows flagged: {with_ends(flagged['fixed'])}."))
    return [*blocks, *_remaining(cell)]


def _remaining(cell: Cell) -> list[Block]:
    """How many generated answers of both models the monitor flags."""
    rows = []
    for name, states in cell.watched["answers"].items():
        row = [name]
        for at in (BASE, FIXED):
            flagged = flags(states[at])
            verdicts = cell.records[name].observations[at].get("score", [None] * len(flagged))
            bad = [flag for flag, verdict in zip(flagged, verdicts, strict=True) if verdict == 1 and flag is not None]
            scored = [flag for flag in flagged if flag is not None]
            row += [f"{sum(scored)} of {len(scored)}", f"{sum(bad)} of {len(bad)}"]
        rows.append(row)
    columns = ["answers to", "flagged before", "of bad ones", "flagged after", "of bad ones that remain"]
    frame = pd.DataFrame(rows, columns=pd.Index(columns))
    if all("score" not in record.observations[FIXED] for record in cell.records.values()):
        frame = frame.drop(columns=[columns[2], columns[4]])
    return [Text("Generated answers that it flags:"), Table(frame, "remaining")]


def unfound_section(case: Case, cell: Cell) -> list[Section]:
    """Answers that the monitor flags and the pattern misses."""
    lines = []
    for name, i in not_found(cell):
        prompt = text_of(case.groups[name].rows[i]["prompt"])
        lines.append(f"- {escape(prompt)} → {escape(cell.records[name].observations[FIXED]['answer'][i])}")
    if not lines:
        return []
    title = "Answers of the fixed model that the monitor flags and the pattern does not find"
    return [Section(title, [Text("\n".join(lines))])]
