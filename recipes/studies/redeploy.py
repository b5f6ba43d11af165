"""Catch and redeploy: which fix made from a few catches generalises to what was never caught? What do monitors see?

    steertune redeploy --dry-run
    steertune redeploy --organisms 0 --folder docs/results/redeploy
    steertune redeploy full --organisms-folder runs/organisms

Every organism (`steertune organism`, made if it is missing) was caught 1, 4 or more times in two families of
situations. Arms are fixes made from these catches: vectors and LoRAs trained on pairs or on corrections, a sum of
existing vectors, suppression, the mean difference subtracted or projected out. They are compared at the same KL to the
organism, by how often they still do something bad in the families that were caught, in others, and where another kind
of action was planted; organisms are the units. Monitors are fitted on the same catches and compared with TF-IDF of the
text. Cells are saved one by one, in one file per organism: an interrupted study continues, and `--organisms` runs a
part of it.
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
    organisms: Annotated[list[int] | None, Option(help="run only these (all of the study)", metavar="N ...")] = None,
    arms: Annotated[list[str] | None, Option(help="run only these (all of the study)", metavar="ARM ...")] = None,
    catches: Annotated[list[int] | None, Option(help="run only these numbers (all)", metavar="N ...")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="print what it would cost, and stop")] = False,
    organisms_folder: Annotated[Path, Option(help="where organisms are read or made")] = Path("runs/organisms"),
    threads: Threads = None,
    folder: Annotated[Path | None, Option(help="where cells and page are kept (runs/redeploy-STUDY)")] = None,
    words: Sequence[str] = (),
) -> Result:
    """Run the missing cells, and write the page of all cells."""
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
    """Run the missing cells of one organism; none if it was not accepted."""
    if refused(world.home):
        return
    number, bar = world.number, Bar(6)
    with bar.step("monitors"):
        file = home / "probes" / f"{number}.json"
        monitors_folder = world.home / "monitors"
        job = Job("monitors", [(number,)], lambda _: _probed(world, monitors_folder))
        if not file.exists() or not monitors_folder.is_dir():
            records_of([job], file, ("organism",), "Monitors")
    with bar.step("fixes", 5):
        cells = [(NOTHING, 0), *((arm, n) for n in some.catches for arm in some.arms)]
        cell = partial(_cell, world, monitors_folder)
        jobs = [Job(f"{arm} {n}", [(number, arm, n)], partial(cell, arm, n)) for arm, n in cells]
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


def _cell(world: World, monitors_folder: Path, arm: str, catches: int, _: Any) -> list[dict[str, Any]]:
    """One cell, whose answers are scored by the monitor of the same number of catches, or of the most if nothing is
    fixed."""
    model, tokenizer = world.loaded
    monitor = monitors.load(monitors_folder / str(catches or max(world.study.catches)), model, tokenizer)
    return [fixed(world, arm, catches, monitor)]


def _probed(world: World, monitors_folder: Path) -> list[dict[str, Any]]:
    """The records of an organism's monitors; the monitors that will score fixed models are saved."""
    answers = {record["set"]: record["answers"] for record in json.loads((world.home / "answers.json").read_text())}
    said = {name: answers[of][: len(rows)] for (name, rows), of in zip(world.asked.items(), SPLIT_SETS, strict=True)}
    records, old = probes(world, said)
    for catches, monitor in old.items():
        monitors.save(monitor, monitors_folder / str(catches))
    return records


def _some(
    study: Study, organisms: Sequence[int] | None, arms: Sequence[str] | None, catches: Sequence[int] | None
) -> Study:
    """The part of a study that is run now.

    Raises:
        ArmError: it has no such organism, arm or number of catches.
    """
    options: dict[str, tuple[Sequence[Any] | None, Sequence[Any]]] = {
        "organisms": (organisms, study.organisms),
        "arms": (arms, [*study.arms]),
        "catches": (catches, study.catches),
    }
    for name, (given, available) in options.items():
        if unknown := [value for value in given or () if value not in available]:
            raise ArmError(f"--{name} {unknown[0]}: the study {study.name!r} has {', '.join(map(str, available))}.")
    chosen = {name: given or available for name, (given, available) in options.items()}
    return study.model_copy(update={**chosen, "arms": {name: study.arms[name] for name in chosen["arms"]}})


if __name__ == "__main__":
    sys.exit(main())
