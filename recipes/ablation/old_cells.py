"""Convert cells of version 3, which stored margins and means in place of observations, to records.

A mean whose examples were not stored becomes an observation of one example, so it counts as before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.rows import AGAIN, BASE, KEYS, MATCHED, TUNED, Record

VERSION = 3
_PREFIXES = {BASE: "base_", TUNED: "", MATCHED: "matched_"}
_LISTS = {"margin": "margins", "score": "behaviours", "answer": "answers"}
_MEANS = ("accuracy", "margin_gain", "moved_wrong", "behaviour", "repetition", "kl")
_FROM_LISTS = {"accuracy": "margin", "margin_gain": "margin", "moved_wrong": "margin", "behaviour": "score"}
"""Means that follow from a list, if it was stored."""
_DROPPED = ("margin", "judgements_failed", "perplexity", "levels")


def is_old(content: Mapping[str, Any]) -> bool:
    """Whether this is the content of an old `cell.json`."""
    return "version" in content and "format" not in content


def record_of(cell: Mapping[str, Any], where: str = "This") -> Record:
    """The record of an old cell.

    Raises:
        ArmError: its version is no longer read, or it lacks what every cell has.
    """
    if cell["version"] != VERSION:
        raise ArmError(f"{where} is of version {cell['version']} of the format; {VERSION} and later are read. {AGAIN}")
    for name in (*KEYS, "status"):
        if name not in cell:
            raise ArmError(f"{where} is not a cell: it has no {name}. {AGAIN}")
    observations = {label: _observations(cell, prefix) for label, prefix in _PREFIXES.items()}
    taken = {prefix + name for prefix in _PREFIXES.values() for name in (*_LISTS.values(), *_MEANS, *_DROPPED)}
    facts = {name: value for name, value in cell.items() if name not in taken and name not in (*KEYS, "version")}
    return Record({name: cell[name] for name in KEYS}, {k: o for k, o in observations.items() if o}, facts)


def _observations(cell: Mapping[str, Any], prefix: str) -> dict[str, list[Any]]:
    observed: dict[str, list[Any]] = {}
    for name, column in _LISTS.items():
        values = cell.get(f"{prefix}{column}")
        if values is not None and len(values):
            observed[name] = [*values]
    for name in _MEANS:
        value = cell.get(f"{prefix}{name}")
        follows = _FROM_LISTS.get(name) in observed
        if value is not None and not follows and math.isfinite(value):
            observed[name] = [float(value)]
    perplexity = cell.get(f"{prefix}perplexity")
    if perplexity is not None and math.isfinite(perplexity):
        observed["perplexity"] = [math.log(perplexity)]  # its values are log-likelihoods
    return observed


def records_of_table(table: pd.DataFrame) -> list[Record]:
    """The records of an old `cells.parquet`, one row per cell.

    Raises:
        ArmError: its version is no longer read.
    """
    records = []
    for row in table.to_dict("records"):
        cell: dict[str, Any] = {str(name): _python(value) for name, value in row.items()}
        setting = {name.removeprefix("setting_"): cell.pop(name) for name in [*cell] if name.startswith("setting_")}
        present = {name: value for name, value in cell.items() if value is not None}
        if present.get("status") == "failed":
            keys = {name: present[name] for name in KEYS}
            records.append(Record(keys, facts={"status": "failed", "error": present.get("error")}))
            continue
        present["setting"] = setting if any(value is not None for value in setting.values()) else None
        records.append(record_of({**present, "error": cell.get("error"), "seed": int(present["seed"])}))
    return records


def _python(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_python(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value
