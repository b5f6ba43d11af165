"""Choose layer and strength: the effect of every setting on the behaviour, and its cost in fluency.

    python -m steertune.recipes.sweep cautious_advice                           # the mean difference
    python -m steertune.recipes.sweep my_pairs/ --direction lat --layers 8 12 0.5 --strengths 1 2 4
    python -m steertune.recipes.sweep my_pairs/ --arm vector_dpo                  # trained at every layer
    python -m steertune.recipes.sweep my_pairs/ --arm runs/vector_dpo-my_pairs    # as that run was trained

At strength 1 a direction is as long as the mean difference of the two answers' states at that layer, so that methods
and layers can be compared; an arm has strength 1 as trained. Settings are measured on validation rows, and one is
recommended, with the reason; only that one is measured on test rows, once. The page has heat maps, the Pareto front
and the slope of every held-out example. `adapter/` is the recommended vector with its strength baked in.

The computation of the lower layers is shared: one pass of the base model serves all layers. An interrupted sweep
continues where it stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, cast

from datasets import concatenate_datasets

from steertune.adapters.blocks import find_blocks
from steertune.adapters.card import versions, write_card
from steertune.adapters.description import Strength, write_description
from steertune.adapters.types import Site
from steertune.recipes.lab import trained_on
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.descriptions import data_of
from steertune.recipes.lab.evaluate import evaluate, evaluate_base
from steertune.recipes.lab.files import ArmError, write_result
from steertune.recipes.lab.generation import plain
from steertune.recipes.lab.options import LAYERS, Argument, Choice, ColumnNames, Layers, Option, Threads, arm_names
from steertune.recipes.lab.pages import table_markdown, write_page
from steertune.recipes.lab.pair_lint import at_edge, warn, warn_of
from steertune.recipes.lab.paths import modules_in
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import Bar, progress
from steertune.recipes.lab.rows import BASE, Record, label
from steertune.recipes.lab.training import check_folder, claim, default_folder
from steertune.recipes.sweeping.card import card
from steertune.recipes.sweeping.choose import Setting
from steertune.recipes.sweeping.context import TEST, VALIDATION, Context
from steertune.recipes.sweeping.page import Sweep, on_test, page_of
from steertune.recipes.sweeping.request import as_typed, request
from steertune.recipes.sweeping.settings import SweepTable
from steertune.recipes.sweeping.sources import Source, bake
from steertune.trainers import NonFiniteError

SITES = ["block"]
SCORER = (
    "also score generated answers, and choose by this score instead of the pair accuracy: "
    f'{", ".join(modules_in("recipes/lab/scorers"))}, or a table such as \'{{kind = "rule", pattern = "careful"}}\''
)
STRENGTHS = [0.5, 1.0, 2.0, 4.0, 8.0]


@command
def main(
    task: Annotated[str, Argument(help="an embedded task, a path or a Hub name, as data.name: preference pairs")],
    direction: Annotated[
        str | None, Choice(modules_in("adapters/directions"), "how the vector is computed (mean_difference)")
    ] = None,
    arm: Annotated[
        str | None,
        Option(
            help="train this arm at every layer instead: a name in recipes/configs/arms/ or a .toml file (both take "
            "--table.key value), or the folder of a training run",
            autocompletion=arm_names,
        ),
    ] = None,
    layers: Layers = LAYERS,
    strengths: Annotated[
        list[float], Option(help="any numbers but 0, negative ones included", metavar="NUMBER ...")
    ] = STRENGTHS,
    sites: Annotated[list[str], Option(help="any of block, attention and mlp", metavar="SITE ...")] = SITES,
    columns: ColumnNames = None,
    model: Annotated[
        str | None, Option(help="embedded, a local folder or a Hub name (embedded, or the arm's)")
    ] = None,
    train: Annotated[int | None, Option(help="training pairs (32, or the arm's)")] = None,
    validation: Annotated[int, Option(help="pairs on which the setting is chosen")] = 24,
    test: Annotated[int, Option(help="test pairs for the report")] = 40,
    seed: Annotated[int, Option(help="seed of the training rows and of training")] = 0,
    scorer: Annotated[str | None, Option(help=SCORER)] = None,
    scorer_rows: Annotated[int, Option(help="pairs on which the scorer is fitted")] = 40,
    generations: Annotated[int, Option(help="answers to generate for each setting")] = 4,
    new_tokens: Annotated[int, Option(help="tokens of the longest answer")] = 24,
    max_kl: Annotated[float, Option(help="largest KL to the base on neutral text, in nats per token")] = 0.3,
    max_perplexity: Annotated[float, Option(help="largest perplexity of neutral text, relative to the base's")] = 1.25,
    max_repetition: Annotated[float, Option(help="largest share of repeated word triples above the base's")] = 0.1,
    threads: Threads = None,
    folder: Annotated[Path | None, Option(help="(runs/sweep-<what>-<task>)")] = None,
    overrides: Sequence[str] = (),
    words: Sequence[str] = (),
) -> Result:
    """Sweep, recommend a setting, and print the page."""
    options = SimpleNamespace(**locals())
    if direction is not None and arm is not None:
        raise ArmError("Give either --direction or --arm.")
    begin(threads, only_one=True)
    result, page = run(options, list(overrides), words)
    return Result(result.to_json(), f"{page.read_text(encoding='utf-8')}\nThis page: {page}")


def run(options: SimpleNamespace, overrides: list[str], words: Sequence[str]) -> tuple[Sweep, Path]:
    """Sweep, recommend a setting, measure it on test rows, and write the page.

    Returns:
        The content of `result.json`, and the page.

    Raises:
        ArmError: a request that cannot be met, or a folder that holds something else.
    """
    started = time.monotonic()
    table = request(options, overrides)
    name = table.direction if table.arm is None else table.arm.name
    folder = options.folder or default_folder(f"sweep-{name}", table.task)
    check_folder(folder, table)
    context = Context(table)  # bad rows are refused before anything is written
    table, notes = context.table, context.rehearse()
    warn_of(concatenate_datasets([context.splits.pool, context.splits.validation]), context.splits.by, table.task)
    note = context.scorer.note if context.scorer is not None else None
    claim(folder, table, main_process=True)
    print("\n".join([_plan(table, context), *notes]), file=sys.stderr)

    # choose on validation rows; only the chosen setting is measured on test rows, and saved
    split = context.splits.note
    result = Sweep(table, measure(context, folder), as_typed(words), note, versions(), split, notes=tuple(notes))
    if (setting := result.choice.setting) is not None:
        held_out = context.held_out(TEST)
        adapter = Source(context).model(cast(Site, setting.site), setting.layer, home_of(folder, setting))
        test = context.record(cast(Site, setting.site), setting.layer, TEST)
        test.observations |= evaluate(adapter, held_out, strengths=[setting.strength])
        bake(adapter, setting.strength)
        adapter.save_pretrained(str(folder / "adapter"))
        trained_on.write(folder / "adapter", context.trained_on())
        prompts = [*map(plain, held_out.prompts)], held_out.neutral["prompt"][: table.generations]
        result = replace(result, test=test, prompts=tuple(prompts[0]), neutral_prompts=tuple(map(plain, prompts[1])))
    result = replace(result, seconds=time.monotonic() - started)
    page = write_page(page_of(result), folder)
    if setting is not None:
        write_card(folder / "adapter", card(result, table_markdown(on_test(result.tested))))
        means, rows = result.tested.record.means(), context.splits.train(table.train, table.seed)
        measured = {"0": means[BASE], "1": means[label(setting.strength)]}
        chosen = Strength(1.0, "a sweep of layers and strengths on validation rows; measured on test rows", measured)
        write_description(folder / "adapter", chosen, data_of(rows, table.task))
    write_result(folder / "result.json", result.to_json())  # written last, since it marks the sweep as finished
    return result, page


def measure(context: Context, folder: Path) -> list[Record]:
    """Measure every setting on validation rows, from the top layer down: one record for each place. Records of an
    earlier run are reused."""
    table, source = context.table, Source(context)
    layers = sorted(table.layers, reverse=True)
    places: list[tuple[Site, int]] = [(site, layer) for site in table.sites for layer in layers]
    records: dict[tuple[Site, int], Record] = {}
    with progress("Settings", len(places) * len(table.strengths)) as bar:
        for site, layer in places:
            records[site, layer] = _at_place(context, source, site, layer, folder, bar)
    return [records[site, layer] for site in table.sites for layer in table.layers]


def _at_place(context: Context, source: Source, site: Site, layer: int, folder: Path, bar: Bar) -> Record:
    """The settings of one place. The adapter is made and the base model run only if a record is missing."""
    record = context.record(site, layer, VALIDATION)
    home = home_of(folder, record)
    file = home / "record.json"
    home.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        record = Record.read(file)
    missing = [strength for strength in context.table.strengths if label(strength) not in record.observations]
    bar.skip(len(context.table.strengths) - len(missing))
    if not missing or record.facts["status"] != "ok":
        return record
    try:
        model = source.model(site, layer, home)
    except NonFiniteError as error:  # a training that diverged is a result
        record.facts |= {"status": "diverged", "error": str(error)}
        record.write(file)
        return record
    held_out = context.held_out(VALIDATION)
    with held_out.remember(model):
        for strength in missing:
            with bar.step(f"{site} {layer} at {strength:g}"):
                record.observations |= evaluate(model, held_out, strengths=[strength])
                record.write(file)
    return record


def home_of(folder: Path, place: Record | Setting) -> Path:
    """Folder of a place's adapter and record, in the sweep's folder."""
    record = place if isinstance(place, Record) else place.record
    return folder / "cells" / f"{record.facts['site']}-{record.facts['layer']}"


def _plan(table: SweepTable, context: Context) -> str:
    """The plan and the expected time, estimated from a pass of the base model that is needed anyway."""
    start = time.monotonic()
    evaluate_base(context.held_out(VALIDATION))
    base = time.monotonic() - start
    accuracy = context.record(table.sites[0], table.layers[0], VALIDATION).value("accuracy")
    warn([at_edge(accuracy, table.splits.validation)], table.task)
    depth = len(find_blocks(context.model))
    above = sum(1 - (layer + 1) / depth for layer in table.layers) * len(table.sites)
    cells = len(table.layers) * len(table.sites) * len(table.strengths)
    seconds = base * (above * len(table.strengths) + 3), base * (cells + 3)
    low, high = (max(1, round(second / 60)) for second in seconds)
    minutes = f"{low} to {high} minutes" if low < high else f"{high} minute{'s' * (high > 1)}"
    return (
        f"{table.what[0].upper()}{table.what[1:]} on {table.task}: layers {table.layers} × strengths "
        f"{table.strengths}"
        + (f" × sites {table.sites}" if table.sites != ["block"] else "")
        + f", {cells} settings\n"
        f"  {table.train} training, {table.splits.validation} validation and {table.splits.test} test pairs\n"
        + (f"  {context.splits.note}\n" if context.splits.note else "")
        + f"  about {minutes}"
        + (", and training at every layer" if table.arm is not None else "")
    )


if __name__ == "__main__":
    sys.exit(main())
