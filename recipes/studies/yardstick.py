"""Which measure names the arm that is nearest to a known teacher? The answer decides which measures are trusted.

    steertune yardstick --folder docs/results/planted
    steertune yardstick --world embedded --problems both --factors layer --studies 2 --folder docs/results/planted

The teacher is the base model plus one known change. Arms learn from answers that are sampled so that the pair carries
what the chosen answer alone lacks, or the other way round; the truth is the KL from the teacher to an arm on fresh
prompts, which no measure sees, at the same KL to the base. A study has several tasks, each with its own
teacher, and treats them as a sample, as reports do. Studies that `studies.json` holds are not run again. A study of
the tiny model takes half a minute of CPU time, one of the embedded model (one small task, two arms) about four
minutes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from steertune.adapters.card import versions
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.observe import HeldOut, neutral_rows
from steertune.recipes.lab.options import Choice, Count, Option
from steertune.recipes.lab.pages import Page, Section, Text, table_of, write_page
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import track
from steertune.recipes.lab.resumable import Job, records_of
from steertune.recipes.studies.planting import FACTORS, WORLDS
from steertune.recipes.studies.planting import PLANTS as NAMES
from steertune.recipes.studies.planting.plants import KL, PLANTS, plant
from steertune.recipes.studies.planting.students import measured, names_of, students
from steertune.recipes.studies.planting.teachers import save_base
from steertune.recipes.studies.planting.winners import compared, sections
from steertune.recipes.studies.planting.worlds import Sizes, World, embedded_world, tiny_world

SIZES = {
    "tiny": Sizes(tasks=6, train=160, test=100, fresh=128, new_tokens=12, steps=16),
    "embedded": Sizes(tasks=1, train=24, test=12, fresh=12, new_tokens=12, steps=6, rows=4),
}
ALL: list[str] = list(NAMES)
_NEUTRAL = 32  # rows to match strengths on, and as many others to report on


@command
def main(
    problems: Annotated[list[str], Choice(ALL, "what is planted", metavar="NAME ...")] = ALL,
    studies: Annotated[int, Count("of every problem")] = 8,
    world: Annotated[str, Choice(WORLDS, "where it is planted")] = "tiny",
    factors: Annotated[
        list[str] | None, Choice(FACTORS, "what is compared (all of a problem)", metavar="NAME ...")
    ] = None,
    folder: Annotated[Path, Option(help="where the studies are kept")] = Path("runs/yardstick"),
    threads: Annotated[int, Count("CPU threads")] = 1,
) -> Result:
    """Run the studies that are missing, and write the table."""
    begin(threads, only_one=True)
    if factors is not None:
        given, problems = problems, [name for name in problems if {*factors} & {*PLANTS[name].factors}]
        if not problems:
            has = sorted({factor for name in given for factor in PLANTS[name].factors})
            raise ArmError(
                f"--factors {' '.join(factors)}: {given} compare {has}. Choose from these, or choose other --problems."
            )
    # made once, when the first study needs it
    where = cache(world_of)

    def job(problem: str, number: int) -> Job:
        key = world, problem, number
        return Job(f"{problem} {number}", [key], lambda _: [study(where(world), problem, number, factors)])

    # problem by problem in turn, so that an interrupted run has some of each
    jobs = [job(problem, number) for number in range(studies) for problem in problems]
    finished = records_of(jobs, folder / "studies.json", ("world", "problem", "number"), "Studies")
    page = write_page(page_of(finished), folder, "table")
    return Result(finished, page.read_text(encoding="utf-8"))


def world_of(name: str) -> World:
    """The base model and its prompts; the tiny model is made anew each time, and is always the same."""
    if name == "embedded":
        return embedded_world(SIZES[name])
    with tempfile.TemporaryDirectory() as home:
        save_base(Path(home))
        return tiny_world(Path(home), SIZES[name])


def study(world: World, problem: str, number: int, factors: Sequence[str] | None = None) -> dict[str, Any]:
    """One study: plant the problem in every task, train the arms, compare them; only in `factors`, if given."""
    started, results = time.process_time(), []
    neutral = neutral_of(world)
    # the embedded model is too slow for twins, and if nothing is planted every comparison is between equals
    plants = PLANTS[problem]
    compared_in = [factor for factor in plants.factors if factors is None or factor in factors]
    names = names_of(compared_in, twins=world.name == "tiny" and not plants.nothing)
    for i in track(range(world.sizes.tasks), "task"):
        seed = 1000 * plants.seed + world.sizes.tasks * number + i
        task = plant(plants, world, seed, neutral)
        arms = students(world, task, seed, names)
        results.append(measured(world, task, arms, neutral, pairs_alone=plants.nothing))
    seconds = round(time.process_time() - started, 1)
    keys = {"world": world.name, "problem": problem, "number": number, "seconds": seconds}
    rounded = {
        comparison: {measure: [float(f"{value:.4g}") for value in pair] for measure, pair in says.items()}
        for comparison, says in compared(results).items()
    }
    return {**keys, "sizes": asdict(world.sizes), "comparisons": rounded}


def neutral_of(world: World) -> HeldOut:
    """Neutral text; for the tiny model, text that it generates itself."""
    if world.name == "embedded":
        parts = [neutral_rows(world.tokenizer, part, count=8) for part in ("match", "report")]
    else:
        prompts = world.prompts(2 * _NEUTRAL, seed=0)
        rows = world.rows(prompts, completion=world.answers(world.model, prompts, 0))
        parts = [neutral_rows(world.tokenizer, part, rows) for part in ("match", "report")]
    return HeldOut(
        world.model, world.tokenizer, pairs=parts[1], matching=parts[0], neutral=parts[1], batch_size=2 * world.batch
    )


def page_of(studies: Sequence[dict[str, Any]]) -> Page:
    """The tables of every world that has studies."""
    problems = [[name, problem.about] for name, problem in PLANTS.items()]
    parts = [
        Section("", [Text(_WHAT), table_of(["problem", "what is planted"], problems)]),
    ]
    for name in SIZES:
        of_world = [one for one in studies if one["world"] == name]
        if of_world:
            parts += [Section(f"The {name} model", [Text(_size(of_world))]), *sections(of_world, name == "tiny")]
    made = (
        "Made by `steertune yardstick --folder docs/results/planted`, with `--world`, `--problems`, `--factors` and "
        f"`--studies` as the counts above say, and {versions()}."
    )
    return Page("Which measures tell the truth", [*parts, Section("How it was made", [Text(made)])])


_WHAT = (
    f"A teacher is the base model plus a random change that has a KL of {KL:g} nats per token to it. Answers are "
    "sampled from the teacher, from the base, or from the base plus another change. The truth about an arm is the KL "
    "from the teacher to it, along answers of the teacher to fresh prompts, with the arm at the strength that has the "
    "teacher's KL to the base on neutral text. Prompts are left out where an answer does not end in time."
)


def _size(studies: Sequence[dict[str, Any]]) -> str:
    sizes = Sizes(**studies[0]["sizes"])
    minutes = sum(one["seconds"] for one in studies) / 60
    counts = Counter(one["problem"] for one in studies)
    listed = ", ".join(f"{name} {counts[name]}" for name in PLANTS if name in counts)
    tasks = "one task" if sizes.tasks == 1 else f"{sizes.tasks} tasks"
    return (
        f"{len(studies)} studies ({listed}), each of {tasks} with a teacher of its own, {sizes.train} training "
        f"prompts, {sizes.test} test prompts and {sizes.fresh} fresh ones; {minutes:.0f} CPU minutes in all."
    )


if __name__ == "__main__":
    sys.exit(main())
