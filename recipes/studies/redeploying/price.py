"""What a study costs: from the cells that were run, else from the tokens that a cell takes and a timed pass."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steertune.recipes.lab import embedded
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.command_line import Result
from steertune.recipes.lab.training import steps_of
from steertune.recipes.studies.organisms.dialogues import SPLITS, Plan
from steertune.recipes.studies.organisms.making import arm_of, demonstrations, training_dialogues
from steertune.recipes.studies.redeploying.tables import NOTHING, Study
from steertune.recipes.studies.redeploying.world import INNOCENT

_BACKWARD = 2.0  # times a forward pass, of layers that hold or lie above what is trained
_SEARCH = 60  # rows that are read to match a strength
_ANSWER = 1.5  # times a forward pass of a row, to generate the answer to its request
_ORGANISM_ROWS = 640  # requests that an organism answers when it is made
_PROBE_ROWS = 420


def price(study: Study, some: Study, organisms: Path, cells: Path) -> Result:
    """The core-hours of the cells and organisms that are missing."""
    row = seconds_of_row()
    measured = _measured(cells)
    table: dict[str, dict[str, float]] = {}
    for arm in (NOTHING, *some.arms):
        seconds = measured.get(arm, estimate(study, arm, row))
        left = [key for key in _asked(some, arm) if key not in _finished(cells)]
        table[arm] = {"cells": len(left), "minutes of a cell": seconds / 60, "hours": seconds * len(left) / 3600}
    missing = [n for n in some.organisms if not (organisms / str(n) / "result.json").is_file()]
    each = organism_seconds(row)
    table["organisms"] = {"cells": len(missing), "minutes of a cell": each / 60, "hours": each * len(missing) / 3600}
    count = len(some.organisms)
    table["monitors"] = {
        "cells": count,
        "minutes of a cell": _PROBE_ROWS * row / 60,
        "hours": _PROBE_ROWS * row * count / 3600,
    }
    hours = sum(line["hours"] for line in table.values())
    lines = [f"{name:16} {line['cells']:4.0f} x {line['minutes of a cell']:6.2f} min" for name, line in table.items()]
    how = f"{len(measured)} arms from cells that were run, others from a timed pass ({row:.2f} s per row)"
    lines += ["", f"Study {study.name!r}: {hours:.1f} core-hours are left ({how})."]
    return Result({"hours": hours, "arms": table}, "\n".join(lines))


def seconds_of_row() -> float:
    """CPU seconds of a forward pass of one row, of the embedded model."""
    rows = demonstrations(training_dialogues(Plan.of(0), 0)[:8])
    model, tokenizer = embedded.load_model(), embedded.load_tokenizer()
    [batch] = batches(tokenizer, rows, len(rows))
    with torch.no_grad():
        model(**{name: batch.inputs[name] for name in ("input_ids", "attention_mask")})
        start = time.process_time()
        model(**{name: batch.inputs[name] for name in ("input_ids", "attention_mask")})
    return (time.process_time() - start) / len(rows)


def estimate(study: Study, arm_name: str, row: float) -> float:
    """Seconds of one cell: training, the search for the strength, and all requests at two strengths."""
    tested, everything = study.tested * len(SPLITS), study.tested * len(SPLITS) + study.innocent * len(INNOCENT)
    asked = (2 * tested + _ANSWER * everything) * row
    if arm_name == NOTHING:
        return asked
    arm = study.arm_of(arm_name, "embedded", 0)
    batch = arm.trainer.get("per_device_train_batch_size", 8)
    answers = 1 if arm.loss.get("name") == "cross_entropy" else 2
    neutral = batch if "neutral" in arm.views_seen() else 0
    # layers below a single vector are neither trained nor changed, so their states are cached
    share = 0.5 if arm.adapter.get("type") == "steering_vector" and arm.adapter.get("layers") != "all" else 1.0
    training = steps_of(arm) * (answers * batch + neutral) * (1 + _BACKWARD)
    return (training + _SEARCH + 2 * tested * 2) * share * row + 2 * _ANSWER * everything * row


def organism_seconds(row: float) -> float:
    """Seconds that making an organism takes."""
    plan = Plan.of(0)
    arm = arm_of(plan, "embedded", 0, 30)
    share = 1 - plan.templates.training.from_layer
    rows = steps_of(arm) * arm.trainer["per_device_train_batch_size"] * (1 + _BACKWARD) * share
    settings = plan.templates.training.unrelated
    rows += settings["max_steps"] * settings["per_device_train_batch_size"] * (1 + _BACKWARD)
    return (rows + _ANSWER * _ORGANISM_ROWS) * row


def _asked(some: Study, arm: str) -> list[tuple[int, str, int]]:
    return [(n, arm, count) for n in some.organisms for count in ([0] if arm == NOTHING else some.catches)]


def _finished(cells: Path) -> set[tuple[int, str, int]]:
    return {(one["organism"], one["arm"], one["catches"]) for one in _records(cells)}


def _measured(cells: Path) -> dict[str, float]:
    """Mean seconds of the cells of every arm that was run."""
    by_arm: dict[str, list[float]] = {}
    for one in _records(cells):
        by_arm.setdefault(one["arm"], []).append(one["seconds"])
    return {arm: float(np.mean(seconds)) for arm, seconds in by_arm.items()}


def _records(cells: Path) -> list[dict[str, Any]]:
    return [one for file in cells.glob("*.json") for one in json.loads(file.read_text(encoding="utf-8"))]
