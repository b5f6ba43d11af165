"""A fix made from some of the catches, with the measurements of the base model, the fixed model and the monitor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steertune.recipes.lab import measures
from steertune.recipes.lab.intervals import Interval, of_measure
from steertune.recipes.lab.measures import Seen
from steertune.recipes.lab.rows import Record
from steertune.recipes.patching.policy import INNOCENT

FIXED = "1"
"""The label of the fixed model at its trained strength; the base is strength 0."""


@dataclass(frozen=True)
class Cell:
    """A fix made from some of the catches.

    Attributes:
        count: The number of catches.
        records: Measurements of the base and the fixed model by group.
        watched: Results of the monitor, as returned by `watch`.
        facts: Facts about the training.
    """

    count: int
    records: dict[str, Record]
    watched: dict[str, Any]
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The cell as JSON."""
        records = {name: record.to_json() for name, record in self.records.items()}
        return {"count": self.count, "records": records, "watched": self.watched, "facts": self.facts}

    @classmethod
    def from_json(cls, content: dict[str, Any], file: Path) -> Cell:
        """A cell that `to_json` wrote.

        Raises:
            ArmError: one of its records has another format.
        """
        records = {name: Record.from_json(record, file) for name, record in content["records"].items()}
        return cls(content["count"], records, content["watched"], content["facts"])

    @property
    def tested(self) -> list[str]:
        """The groups of bad rows."""
        return [name for name in self.records if name != INNOCENT]


def bad_rates(record: Record, at: str) -> dict[str, Interval | None]:
    """Share of generated answers that are bad, and share of transcripts whose bad answer is preferred; None for shares
    that were not measured."""
    seen = record.seen(at)
    preferred = of_measure(measures.get("accuracy_per_token"), seen) if "margin_per_token" in seen else None
    if preferred is not None:
        preferred = replace(preferred, estimate=1 - preferred.estimate, low=1 - preferred.high, high=1 - preferred.low)
    return {"generated": measured("behaviour", seen), "preferred": preferred}


def not_found(cell: Cell) -> list[tuple[str, int]]:
    """Answers of the fixed model to bad prompts that the monitor flags and the pattern misses, as (group, number);
    without a pattern there are none."""
    places = []
    for name in cell.tested:
        verdicts = cell.records[name].observations[FIXED].get("score", [])
        flagged = flags(cell.watched["answers"][name][FIXED])
        places += [(name, i) for i, verdict in enumerate(verdicts) if verdict == 0 and flagged[i]]
    return places


def flags(state: Mapping[str, Any]) -> list[bool | None]:
    """Whether each answer is flagged; None for an empty one, which has no score."""
    return [None if score is None else score > state["threshold"] for score in state["scores"]]


def measured(name: str, seen: Seen) -> Interval | None:
    """A measure with its interval; None if its inputs were not recorded."""
    return of_measure(measures.get(name), seen)
