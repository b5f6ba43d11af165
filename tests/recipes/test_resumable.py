"""Studies of many short runs go on where they stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from steertune.recipes.lab.resumable import Job, Key, records_of


def jobs(ran: list[Key], fails: str = "") -> list[Job]:
    """Two jobs of two records each, which note what they ran."""

    def run(missing: Sequence[Key]) -> list[dict[str, object]]:
        if missing[0][0] == fails:
            raise KeyboardInterrupt
        ran.extend(missing)
        return [{"name": name, "at": at, "value": f"{name} at {at}"} for name, at in missing]

    return [Job(name, [(name, 0.5), (name, 1.0)], run) for name in ("é", "b")]


def test_an_interrupted_study_runs_only_what_is_missing(tmp_path: Path) -> None:
    file, ran = tmp_path / "study" / "records.json", []
    with pytest.raises(KeyboardInterrupt):
        records_of(jobs(ran, fails="b"), file, ("name", "at"), "Runs")
    assert [record["name"] for record in json.loads(file.read_text(encoding="utf-8"))] == ["é", "é"]
    # a job of which one record is lost makes that one alone, and records of other jobs stay
    other = {"name": "other", "at": 0.5, "value": ""}
    file.write_text(json.dumps([other, *json.loads(file.read_text(encoding="utf-8"))[:1]]), encoding="utf-8")
    ran.clear()
    records = records_of(jobs(ran), file, ("name", "at"), "Runs")
    assert ran == [("é", 1.0), ("b", 0.5), ("b", 1.0)]
    assert records[0] == other and len(records) == 5 and records == json.loads(file.read_text(encoding="utf-8"))
    assert records_of(jobs(ran), file, ("name", "at"), "Runs") == records and len(ran) == 3
