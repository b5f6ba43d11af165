"""The transcripts of an organism: what was caught, what is only tested on, traffic, and a labelled stream."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steertune.recipes.lab.files import write_whole
from steertune.recipes.studies.organisms.acceptance import BENIGN, NEAR_MISSES
from steertune.recipes.studies.organisms.dialogues import SPLITS, Dialogue, Plan

CATCHES = 16
STREAM_RATE = 50
"""One request in this many has a situation."""
SPLIT_SETS = (*(f"tested {split}" for split in SPLITS), NEAR_MISSES, BENIGN)
"""The sets of requests on which fixes and monitors are tested."""


def sets_of(plan: Plan, seed: int, tested: int, traffic: int, stream: int) -> dict[str, list[Dialogue]]:
    """All requests that an organism answers for its files.

    Args:
        plan: Its plan.
        seed: Seed of the rows.
        tested: Requests in a situation, per split.
        traffic: Innocent requests, a quarter of them near misses.
        stream: Requests of the stream, one in 50 of them in a situation.

    Returns:
        `caught`, `tested caught`, `tested near`, `tested far`, `traffic`, `stream`.
    """
    draw = random.Random(f"sets {seed}")
    families = [*plan.kinds]
    # more than are needed: an organism does not always do what it was taught
    sets = {"caught": plan.cues(plan.families("caught"), "caught", "unseen", CATCHES + CATCHES // 4, draw)}
    for split in SPLITS:
        sets[f"tested {split}"] = plan.cues(plan.families(split), "tested", "unseen", tested, draw)
    near_misses = plan.cues(families, "caught", "unseen", traffic // 4, draw, near_miss=True)
    sets["traffic"] = plan.benign("seen", traffic - len(near_misses), draw) + near_misses
    rare = plan.cues(families, "tested", "unseen", stream // STREAM_RATE, draw)
    sets["stream"] = rare + plan.benign("unseen", stream - len(rare), draw)
    for name in ("traffic", "stream"):
        draw.shuffle(sets[name])
    return sets


def write_files(
    plan: Plan, sets: Mapping[str, Sequence[Dialogue]], said: Mapping[str, Sequence[str]], home: Path
) -> dict[str, int]:
    """Write the transcripts that `patch`, `monitor` and `watch` read: `caught.jsonl`, `near.jsonl`, `far.jsonl`,
    `traffic.jsonl` and `stream.jsonl`.

    Args:
        plan: The organism's plan.
        sets: The requests from `sets_of`.
        said: Its answers to them.
        home: The folder.

    Returns:
        Name of a file -> its number of rows.
    """
    files: dict[str, list[dict[str, Any]]] = {
        "caught": bad_rows(plan, sets["caught"], said["caught"])[:CATCHES],
        "near": bad_rows(plan, sets["tested near"], said["tested near"]),
        "far": bad_rows(plan, sets["tested far"], said["tested far"]),
    }
    traffic = [*zip(sets["traffic"], said["traffic"], strict=True)]
    files["traffic"] = [
        {"prompt": row.prompt, "completion": text} for row, text in traffic if text and plan.verdict(row, text) is None
    ]
    stream = [*zip(sets["stream"], said["stream"], strict=True)]
    files["stream"] = [
        {"prompt": row.prompt, "completion": text, "bad": plan.verdict(row, text) is not None}
        for row, text in stream
        if text
    ]
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(home / f"{name}.jsonl", lines)
    return {name: len(rows) for name, rows in files.items()}


def bad_rows(plan: Plan, rows: Sequence[Dialogue], texts: Sequence[str]) -> list[dict[str, Any]]:
    """The answers that do what the organism was taught, each with its correction, without repeated requests."""
    by_request: dict[tuple[str, str], dict[str, Any]] = {}
    for row, text in zip(rows, texts, strict=True):
        if plan.verdict(row, text) == plan.kinds[row.family]:
            bad_row = {"prompt": row.prompt, "bad": text, "corrected": row.good}
            by_request.setdefault((row.situation, row.request), bad_row)
    return [*by_request.values()]
