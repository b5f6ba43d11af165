"""The one record of every recipe: rows `(arm, task, examples, seed, strength, measure, example, value)`.

A training run, a cell of a grid, a setting of a sweep, a distilled prompt and a prompted baseline are the same record
under other keys. It stores *observations*: the outputs of the model for every held-out example (log-probabilities of
its answers, tokens, generated texts). Measures (`lab/measures/`) are functions of observations, so a measure added
later needs no new run.

`strength` is a number, or the word for a strength that was chosen: `tuned`, `matched`, or `kl=0.1` for a point of a
frontier. Strength 0 is the base model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from steertune.recipes.lab import measures
from steertune.recipes.lab.files import ArmError, read_result, write_result
from steertune.recipes.lab.measures import Missing, Seen

BASE = "0"
"""The label of the base model's observations: every adapter at strength 0."""
TUNED, MATCHED = "tuned", "matched"
"""Labels of strengths that were chosen by tuning, or to match the grid's KL."""
FRONTIER = "frontier"
"""The label of the mean over the strengths of a frontier (`at_kl`)."""
KEYS = ("arm", "task", "examples", "seed")
FORMAT = 4
"""Format of a record's file; `ablation/old_cells.py` reads older formats."""
AGAIN = "Delete it, and it is run again."
_TABLES: dict[str, type] = {"facts": dict, "observations": dict}
COLUMNS = (*KEYS, "strength", "measure", "example", "value", "text")

_JSON = "json:"
_AT_KL = "kl="


@dataclass
class Record:
    """All results of one model.

    Attributes:
        keys: Arm, task, number of examples and seed.
        observations: Strength -> the model's observations at this strength; `BASE` is the base model.
        facts: Values that do not belong to an example: status, cost, the setting that was chosen, versions.
    """

    keys: dict[str, Any]
    observations: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def seen(self, strength: float | str = BASE) -> Seen:
        """The observations at a strength, together with those of the base model.

        Raises:
            KeyError: the model was not measured at this strength.
        """
        base = self.observations.get(BASE)
        return Seen(self.observations[label(strength)], None if base is None else Seen(base, None))

    def value(self, measure: str, strength: float | str = BASE) -> float:
        """A measure's mean over the examples; NaN if the record lacks the observations that it needs."""
        try:
            return measures.get(measure).summary(self.seen(strength))
        except (KeyError, Missing):
            return math.nan

    def means(self) -> dict[str, dict[str, float]]:
        """Strength -> measure -> its mean, for every measure whose observations are in the record."""
        table = {at: {name: self.value(name, at) for name in measures.names()} for at in self.observations}
        return {at: {name: mean for name, mean in row.items() if not math.isnan(mean)} for at, row in table.items()}

    def to_json(self) -> dict[str, Any]:
        """The record as JSON. Its rows are grouped, so that no key is written twice."""
        return {"format": FORMAT, **self.keys, "facts": self.facts, "observations": self.observations}

    @classmethod
    def from_json(cls, content: dict[str, Any], file: Path) -> Record:
        """A record that `to_json` wrote.

        Raises:
            ArmError: it is not a record, or has another format; the message names its file.
        """
        if content.get("format") != FORMAT:
            raise ArmError(f"{file} has format {content.get('format')!r}, this version reads {FORMAT}. {AGAIN}")
        for name, kind in {"arm": str, "task": str, "examples": int, "seed": int, **_TABLES}.items():
            if not isinstance(content.get(name), kind) or isinstance(content.get(name), bool):
                raise ArmError(f"{file} is not a record: {name}={content.get(name)!r:.80}. {AGAIN}")
        return cls({name: content[name] for name in KEYS}, content["observations"], content["facts"])

    def write(self, file: Path) -> None:
        """Write the record as JSON, whole or not at all."""
        write_result(file, self.to_json())

    @classmethod
    def read(cls, file: Path) -> Record:
        """A record that `write` wrote.

        Raises:
            ArmError: the file is damaged, is not a record, or has another format.
        """
        return cls.from_json(read_result(file, AGAIN), file)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The record as rows: observations have a strength and an example, facts have neither."""
        for name, value in self.facts.items():
            yield {**self.keys, "measure": name, **_as_value(value)}
        for strength, named in self.observations.items():
            for name, values in named.items():
                for example, value in enumerate(values):
                    yield {**self.keys, "strength": strength, "measure": name, "example": example, **_as_value(value)}


def label(strength: float | str) -> str:
    """The label of a strength in a row."""
    return strength if isinstance(strength, str) else f"{strength:g}"


def at_kl(target: float) -> str:
    """The label of the strength at which a KL to the base model is reached: a point of a frontier."""
    return f"{_AT_KL}{target:g}"


def frontier_kl(strength: str) -> float | None:
    """The KL of a label of `at_kl`; None for any other label."""
    return float(strength.removeprefix(_AT_KL)) if strength.startswith(_AT_KL) else None


def to_table(records: Sequence[Record]) -> pd.DataFrame:
    """The rows of several records as one table."""
    table = pd.DataFrame([row for record in records for row in record.rows()], columns=pd.Index(COLUMNS))
    return table.astype({"strength": "string", "example": "Int32", "value": "float64", "text": "string"})


def from_table(table: pd.DataFrame) -> list[Record]:
    """Records from the rows of `to_table`, in their order."""
    records: dict[tuple[Any, ...], Record] = {}
    columns = [table[name].tolist() for name in COLUMNS]
    for *keys, strength, measure, _, value, text in zip(*columns, strict=True):
        record = records.setdefault(tuple(keys), Record(dict(zip(KEYS, keys, strict=True))))
        content = _from_value(value, text)
        if isinstance(strength, str):
            record.observations.setdefault(strength, {}).setdefault(measure, []).append(content)
        else:
            record.facts[measure] = content
    return [*records.values()]


def _as_value(value: Any) -> dict[str, Any]:
    """A number in the column `value`; anything else in the column `text`, as JSON unless it is a text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"value": float(value), "text": None}
    if value is None or (isinstance(value, str) and not value.startswith(_JSON)):
        return {"value": None, "text": value}
    return {"value": None, "text": _JSON + json.dumps(value)}


def _from_value(value: Any, text: Any) -> Any:
    if isinstance(text, str):
        return json.loads(text.removeprefix(_JSON)) if text.startswith(_JSON) else text
    if value is None or math.isnan(value):
        return None
    return int(value) if float(value).is_integer() else float(value)
