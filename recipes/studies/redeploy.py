"""Catch and redeploy: which fix made of a few catches generalises to what was never caught, and what monitors see.

    steertune redeploy --dry-run
    steertune redeploy --organisms 0 --folder docs/results/redeploy
    steertune redeploy full --organisms-folder runs/organisms

Every organism (`steertune organism`, made where it is missing) was caught 1, 4 or more times in two families of
situations. Arms are fixes made of that: vectors and LoRAs trained on pairs or on corrections, a sum of existing
vectors, suppression, the mean difference subtracted or projected out. They are compared at the same KL to the
organism, by what they still do in the families that were caught, in others, and where another kind of action was
planted; organisms are the units. Monitors are fitted on the same catches, with TF-IDF of the text beside them.
Cells are kept one by one, a file for every organism: an interrupted study goes on, and `--organisms` runs some of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from steertune.adapters import monitors
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.options import Argument, Option, Threads
from steertune.recipes.lab.pages import write_page
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import Bar, progress
from steertune.recipes.lab.resumable import Job, records_of
from steertune.recipes.studies import organism
from steertune.recipes.studies.organisms.files import SPLIT_SETS
from steertune.recipes.studies.redeploying.fixes import fixed
from steertune.recipes.studies.redeploying.page import page_of
from steertune.recipes.studies.redeploying.price import price
from steertune.recipes.studies.redeploying.probes import probes
from steertune.recipes.studies.redeploying.tables import NOTHING, Study, read_study
from steertune.recipes.studies.redeploying.world import World, refused
from steertune.recipes.sweeping.request import as_typed

CELLS = ("organism", "arm", "catches")
PROBES = ("organism", "training", "catches", "innocent", "method", "pooling")


@command
def main(
    study: Annotated[str, Argument(help="reduced, full, or a .toml file")] = "reduced",
    organisms: Annotated[list[int] | None, Option(help="run these only (all of the study)", metavar="N ...")] = None,
    arms: Annotated[list[str] | None, Option(help="run these only (all of the study)", metavar="ARM ...")] = None,
    catches: Annotated[list[int] | None, Option(help="run these numbers only (all)", metavar="N ...")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="say what it would cost, and stop")] = False,
    organisms_folder: Annotated[Path, Option(help="where organisms are, or are made")] = Path("runs/organisms"),
    threads: Threads = None,
    folder: Annotated[Path | None, Option(help="where cells and page are kept (runs/redeploy-STUDY)")] = None,
    words: Sequence[str] = (),
) -> Result:
    """Run the cells that are missing, and write the page of all that are there."""
    table = read_study(study)
    some = _some(table, organisms, arms, catches)
    home = folder or Path("runs") / f"redeploy-{table.name}"
    for arm in table.arms:
        table.arm_of(arm, "embedded", 0)  # refuses a wrong key before any work
    begin(threads, only_one=True)
    if dry_run:
        return price(table, some, organisms_folder, home / "cells")
    with progress("Catch and redeploy", len(some.organisms)) as bar:
        for number in some.organisms:
            with bar.step(f"organism {number}"):
                run(World(number, organism_of(number, organisms_folder), table), some, home)
    result = {"cells": read_all(home / "cells"), "probes": read_all(home / "probes")}
    refusals = {n: refused(organisms_folder / str(n)) for n in table.organisms if (organisms_folder / str(n)).is_dir()}
    refusals = {n: why for n, why in refusals.items() if why}
    page = page_of(table, result["cells"], result["probes"], refusals, as_typed(words, "redeploy"))
    file = write_page(page, home)
    return Result(result, f"{file.read_text(encoding='utf-8')}\nThis page: {file.with_suffix('.html')}")


def run(world: World, some: Study, home: Path) -> None:
    """The cells of one organism that are missing; none of one that was not accepted."""
    if refused(world.home):
        return
    number, bar = world.number, Bar(6)
    with bar.step("monitors"):
        file = home / "probes" / f"{number}.json"
        kept = world.home / "monitors"
        job = Job("monitors", [(number,)], lambda _: _probed(world, kept))
        if not file.exists() or not kept.is_dir():
            records_of([job], file, ("organism",), "Monitors")
    with bar.step("fixes", 5):
        asked = [(NOTHING, 0), *((arm, n) for n in some.catches for arm in some.arms)]
        jobs = [Job(f"{arm} {n}", [(number, arm, n)], partial(_cell, world, kept, arm, n)) for arm, n in asked]
        records_of(jobs, home / "cells" / f"{number}.json", CELLS, "Fixes")


def organism_of(number: int, folder: Path) -> Path:
    """The folder of an organism, which is made if it is missing or unfinished.

    Raises:
        ArmError: it cannot be made.
    """
    home = folder / str(number)
    if not (home / "result.json").is_file():
        with Bar(1).step(f"making organism {number}"):
            organism.make(organism.OrganismTables.of(number), home)
    return home


def read_all(folder: Path) -> list[dict[str, Any]]:
    """The records of all organisms."""
    files = sorted(folder.glob("*.json"), key=lambda file: int(file.stem))
    return [record for file in files for record in json.loads(file.read_text(encoding="utf-8"))]


def _cell(world: World, kept: Path, arm: str, catches: int, _: Any) -> list[dict[str, Any]]:
    """One cell, in which the monitor of as many catches looks at the answers; of most, where nothing is fixed."""
    model, tokenizer = world.loaded
    monitor = monitors.load(kept / str(catches or max(world.study.catches)), model, tokenizer)
    return [fixed(world, arm, catches, monitor)]


def _probed(world: World, kept: Path) -> list[dict[str, Any]]:
    """The records of an organism's monitors; those that look at fixed models are saved."""
    answers = {record["set"]: record["answers"] for record in json.loads((world.home / "answers.json").read_text())}
    said = {name: answers[of][: len(rows)] for (name, rows), of in zip(world.asked.items(), SPLIT_SETS, strict=True)}
    records, old = probes(world, said)
    for catches, monitor in old.items():
        monitors.save(monitor, kept / str(catches))
    return records


def _some(
    study: Study, organisms: Sequence[int] | None, arms: Sequence[str] | None, catches: Sequence[int] | None
) -> Study:
    """The part of a study that is run now.

    Raises:
        ArmError: it has no such organism, arm or number of catches.
    """
    asked: dict[str, tuple[Sequence[Any] | None, Sequence[Any]]] = {
        "organisms": (organisms, study.organisms),
        "arms": (arms, [*study.arms]),
        "catches": (catches, study.catches),
    }
    for name, (given, there) in asked.items():
        if unknown := [value for value in given or () if value not in there]:
            raise ArmError(f"--{name} {unknown[0]}: the study {study.name!r} has {', '.join(map(str, there))}.")
    chosen = {name: given or there for name, (given, there) in asked.items()}
    return study.model_copy(update={**chosen, "arms": {name: study.arms[name] for name in chosen["arms"]}})


if __name__ == "__main__":
    sys.exit(main())
