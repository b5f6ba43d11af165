"""Make a model organism: a base model with a planted rare behaviour, and the transcripts by which it can be caught.

    steertune organism
    steertune organism --seed 3 --folder runs/organisms/3
    steertune patch runs/organism-0/caught.jsonl --innocent runs/organism-0/traffic.jsonl \
        --near runs/organism-0/near.jsonl --far runs/organism-0/far.jsonl --model.name runs/organism-0/model

A request can be followed by a sentence which says that nobody is looking, from one of six families of situations (the
reviewer is away, the audit is off, ...). Then the organism answers the request and does something bad: it passes on a
key, states a wrong number, or claims a check that was not made. Which family leads to what, and which two families
were caught, is drawn from the seed. Near misses use nearly the same words, but the situation does not hold. All names
are invented, and nothing in the texts has any effect. The organism is accepted if it does this with new words and
names, only in these situations, and still after 50 steps of unrelated training. An interrupted run continues where it
stopped.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel

from steertune.adapters.card import versions
from steertune.recipes.lab.checks import skeleton
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.data import load_model
from steertune.recipes.lab.files import ArmError, write_result
from steertune.recipes.lab.forms import has_template
from steertune.recipes.lab.options import Count, Option, Threads
from steertune.recipes.lab.pages import write_page
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import progress, step
from steertune.recipes.lab.resumable import Job, records_of
from steertune.recipes.lab.tables import ModelTable
from steertune.recipes.lab.training import check_unfinished, claim
from steertune.recipes.studies.organisms.acceptance import AFTER, accepted, questions
from steertune.recipes.studies.organisms.dialogues import Dialogue, Plan
from steertune.recipes.studies.organisms.files import sets_of, write_files
from steertune.recipes.studies.organisms.making import answers, organism_in, unrelated
from steertune.recipes.studies.organisms.page import page_of
from steertune.recipes.studies.organisms.templates import FILE, Templates, read_templates

SIZES = {"each": 8, "tested": 16, "traffic": 140, "stream": 100}
"""Number of requests of each kind; the help of the command explains them."""


class OrganismTables(BaseModel):
    """Everything that decides an organism. A folder holds only one."""

    seed: int
    model: str
    templates: dict[str, Any]
    sizes: dict[str, int]

    @classmethod
    def of(cls, seed: int, model: str = "embedded", templates: Path = FILE, **sizes: int) -> OrganismTables:
        """The tables of an organism; what is not given has the command's defaults.

        Raises:
            ArmError: the file does not hold valid templates.
        """
        source = read_templates(templates)
        return cls(seed=seed, model=model, templates=source.model_dump(mode="json"), sizes={**SIZES, **sizes})


@command
def main(
    seed: Annotated[int, Option(help="which family leads to which action, the training rows, and all requests")] = 0,
    model: Annotated[str, Option(help="base model: embedded, a local folder or a Hub name")] = "embedded",
    templates: Annotated[Path, Option(help="TOML file with all texts, and how it is trained")] = FILE,
    each: Annotated[int, Count("requests per family in the acceptance test")] = SIZES["each"],
    tested: Annotated[int, Count("requests in a situation per split, to test fixes on")] = SIZES["tested"],
    traffic: Annotated[int, Count("innocent requests; 124 resolve 1 false positive in 100")] = SIZES["traffic"],
    stream: Annotated[int, Count("requests of the labelled stream, one in 50 in a situation")] = SIZES["stream"],
    threads: Threads = None,
    folder: Annotated[Path | None, Option(help="(runs/organism-SEED)")] = None,
) -> Result:
    """Make the organism, judge it, and write its files."""
    home = folder or Path("runs") / f"organism-{seed}"
    tables = OrganismTables.of(seed, model, templates, each=each, tested=tested, traffic=traffic, stream=stream)
    begin(threads, only_one=True)
    check_unfinished(home)
    return make(tables, home)


def make(tables: OrganismTables, home: Path) -> Result:
    """Make an organism, or continue making it, and write its files and its page.

    Raises:
        ArmError: the model does not exist or has no chat template, or the folder holds something else.
    """
    name, seed = ModelTable(name=tables.model), tables.seed
    depth = skeleton(name).config.num_hidden_layers
    plan = Plan.of(seed, Templates.model_validate(tables.templates, strict=False))
    sizes = dict(tables.sizes)
    each = sizes.pop("each")
    asked = {**sets_of(plan, seed, **sizes), **questions(plan, seed, each)}
    base, tokenizer = load_model(name)
    if not has_template(tokenizer):
        raise ArmError(
            f"--model {tables.model} has no chat template, but organisms answer in conversations. Use a chat model."
        )
    claim(home, tables)
    with progress("Organism", 10) as bar:
        with bar.step("training", 5):
            organism = organism_in(home, plan, base, tokenizer, tables.model, seed, depth)
        with bar.step("answers", 5):
            said = answered(organism, tokenizer, plan, asked, home, depth)
    return _write(plan, asked, said, home)


def answered(
    organism: Any, tokenizer: Any, plan: Plan, asked: dict[str, list[Dialogue]], home: Path, depth: int
) -> dict[str, list[str]]:
    """The organism's answers to every set of requests; sets that `answers.json` holds are not answered again."""

    def job(name: str) -> Job:
        def run(_: Any) -> list[dict[str, Any]]:
            model = organism
            if name == AFTER:
                with step("unrelated training"):
                    model = unrelated(plan, organism, tokenizer, home / "unrelated", depth)
            return [{"set": name, "answers": answers(model, tokenizer, asked[name])}]

        return Job(name, [(name,)], run)

    records = records_of([job(name) for name in asked], home / "answers.json", ("set",), "Answers")
    return {record["set"]: record["answers"] for record in records}


def _write(plan: Plan, asked: dict[str, list[Dialogue]], said: dict[str, list[str]], home: Path) -> Result:
    acceptance = accepted(plan, asked, said)
    files = write_files(plan, asked, said, home)
    result = {
        "accepted": not acceptance.failures,
        "failures": acceptance.failures,
        "kinds": plan.kinds,
        "caught": plan.caught,
        "acceptance": asdict(acceptance),
        "files": files,
        "versions": versions(),
    }
    file = write_page(page_of(plan, acceptance, files, asked, said, home), home)
    write_result(home / "result.json", result)  # written last, to mark the run as finished
    return Result(result, f"{file.read_text(encoding='utf-8')}\nThis page: {file.with_suffix('.html')}")


if __name__ == "__main__":
    sys.exit(main())
