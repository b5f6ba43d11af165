"""Studies of many short runs that continue where they stopped: a JSON file of records is written after every run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from steertune.recipes.lab.files import write_whole
from steertune.recipes.lab.progress import progress

Key: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class Job:
    """A run that makes one or more records.

    Attributes:
        called: Its name in the progress bar.
        keys: Keys of its records.
        run: Makes the records of the missing keys.
    """

    called: str
    keys: Sequence[Key]
    run: Callable[[Sequence[Key]], Sequence[Mapping[str, Any]]]


def records_of(jobs: Sequence[Job], file: Path, columns: Sequence[str], title: str) -> list[dict[str, Any]]:
    """Run the jobs whose records are not in the file yet; return all its records, including those of other jobs.

    Args:
        jobs: The runs, in order.
        file: The JSON file of records, one per line.
        columns: The columns of a record whose values are its key.
        title: Title of the progress bar.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    finished = {tuple(record[column] for column in columns) for record in records}
    with progress(title, len(jobs)) as bar:
        for job in jobs:
            missing = [key for key in job.keys if key not in finished]
            if not missing:
                bar.skip()
                continue
            with bar.step(job.called):
                records += map(dict, job.run(missing))
                lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
                write_whole(file, f"[\n{lines}\n]\n")
    return records
