"""Map interventions: which layers carry a behaviour, which of them interact, and does the map predict other sets?

    python -m steertune.recipes.map cautious_advice
    python -m steertune.recipes.map my_pairs/ --layers 4 8 12 16 20 24 --combinations 60

Every layer gets a vector (the mean difference), scaled so that each vector alone has the same small KL to the base.
The margins of test pairs are measured with each vector alone, added and subtracted, with every pair of vectors, and
with random directions of the same KL instead; then with random sets of 3 to 5 layers, which the map has to predict.
Finally the best layer is compared with the three best ones, at one KL, on pairs that no choice was based on. The
computation of the lower layers is shared. An interrupted map continues where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np

from steertune.adapters.analysis.controls import random_directions
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.files import ArmError, write_result
from steertune.recipes.lab.intervals import interval
from steertune.recipes.lab.observe import FEW_NEUTRAL, HeldOut, neutral_rows
from steertune.recipes.lab.options import LAYERS, Argument, Choice, ColumnNames, Count, Layers, Option, Threads
from steertune.recipes.lab.pages import write_page
from steertune.recipes.lab.paths import modules_in
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import progress
from steertune.recipes.lab.resumable import Job, records_of
from steertune.recipes.lab.training import check_folder, claim, default_folder
from steertune.recipes.mapping.effects import (
    NOTHING,
    Margins,
    Set,
    effect,
    interactions,
    main_effects,
    prediction,
)
from steertune.recipes.mapping.gradient import first_order
from steertune.recipes.mapping.interventions import (
    Interventions,
    margins,
    random_sets,
    sets_to_measure,
    strength_at,
)
from steertune.recipes.mapping.page import MapResult, Spread, page_of
from steertune.recipes.sweeping.context import TEST, VALIDATION, Context
from steertune.recipes.sweeping.request import as_typed, request
from steertune.recipes.sweeping.sources import Source

VECTOR, CONTROL = "vector", "control"
SPREAD = 3
"""Number of best layers that are compared with the single best one."""


@command
def main(
    task: Annotated[str, Argument(help="an embedded task, a path or a Hub name, as data.name: preference pairs")],
    direction: Annotated[
        str, Choice(modules_in("adapters/directions"), "how the vectors are computed")
    ] = "mean_difference",
    layers: Layers = LAYERS,
    kl: Annotated[float, Option(help="KL to the base of every vector alone, nats per token of neutral text")] = 0.03,
    combinations: Annotated[int, Count("number of sets of 3 to 5 layers that the map has to predict")] = 30,
    columns: ColumnNames = None,
    model: Annotated[str | None, Option(help="embedded, a local folder or a Hub name (embedded)")] = None,
    train: Annotated[int, Count("pairs from which the vectors are computed")] = 32,
    rows: Annotated[int, Count("pairs on which effects are measured")] = 32,
    test: Annotated[int, Count("pairs for the last comparison")] = 32,
    seed: Annotated[int, Option(help="seed of the training rows, the controls and the sets")] = 0,
    threads: Threads = None,
    folder: Annotated[Path | None, Option(help="(runs/map-<task>)")] = None,
    words: Sequence[str] = (),
) -> Result:
    """Map the task, and print the page."""
    if not 0 < kl <= 1:
        raise ArmError(f"--kl {kl} must be above 0 and at most 1 (nats per token). Use a small one, such as 0.03.")
    options = SimpleNamespace(
        task=task, arm=None, direction=direction, layers=layers, sites=["block"], strengths=[1.0], columns=columns,
        model=model, train=train, validation=rows, test=test, seed=seed, scorer=None, scorer_rows=0, generations=0,
        new_tokens=1, max_kl=kl, max_perplexity=1.25, max_repetition=0.1,
    )  # fmt: skip
    begin(threads, only_one=True)
    table = request(options, [])
    if len(table.layers) < SPREAD:
        raise ArmError(f"--layers {' '.join(map(str, table.layers))}: a map needs {SPREAD} different layers or more.")
    others = random_sets(sorted(set(table.layers)), combinations, seed)
    folder = folder or default_folder("map", task)
    check_folder(folder, table)
    context = Context(table)
    notes = context.rehearse()
    claim(folder, table, main_process=True)
    result = mapped(context, others, kl, folder, as_typed(words, "map"), notes)
    page = write_page(page_of(result), folder)
    write_result(folder / "result.json", _json(result))
    return Result(_json(result), f"{page.read_text(encoding='utf-8')}\nThis page: {page}")


def mapped(
    context: Context, others: Sequence[Set], kl: float, folder: Path, command_line: str, notes: Sequence[str]
) -> MapResult:
    """Measure everything on the page.

    Args:
        context: The model and the rows.
        others: Sets that the map has to predict.
        kl: KL of every vector alone.
        folder: Folder of `strengths.json` and `sets.json`.
        command_line: The command line, for the page.
        notes: Notes on the rows.

    Raises:
        ArmError: a vector is zero, or does not reach the KL.
    """
    matching = neutral_rows(context.tokenizer, "match", count=FEW_NEUTRAL)
    held_out = replace(context.held_out(VALIDATION), matching=matching)
    directions = Source(context).vectors("block")
    controls = random_directions([*directions.values()], context.table.seed)
    made = {VECTOR: directions, CONTROL: dict(zip(directions, controls, strict=True))}
    ours, theirs = sets_to_measure(sorted(directions))
    with progress("Map", 10) as bar:
        with bar.step("strengths", 2):
            units = {kind: scaled(context, held_out, kind, vectors, kl, folder) for kind, vectors in made.items()}
        # each set is measured once; those in the file are not measured again
        with bar.step("sets", 7):
            jobs = [_job(context, held_out, VECTOR, units[VECTOR], of) for of in [*ours, *others]]
            jobs += [_job(context, held_out, CONTROL, units[CONTROL], of) for of in theirs]
            records = records_of(jobs, folder / "sets.json", ("kind", "set"), "Sets")
        measured, random = _margins_of(records, [*ours, *others], theirs)
        vectors = units[VECTOR]
        effects = main_effects(measured, vectors.layers)
        with bar.step("one layer against several"):
            estimates = first_order(context.model, held_out, vectors.vectors)
            alone = {one.layer: one.mean for one in effects if one.sign > 0}
            compared = spread(context, held_out, vectors, alone, kl)
    return MapResult(
        task=Path(context.table.task).name,
        direction=str(context.table.direction),
        kl=kl,
        rows=len(measured[NOTHING]),
        strengths=dict(vectors.strengths),
        effects=effects,
        gradient={layer: float(values.mean()) for layer, values in estimates.items()},
        interactions=interactions(measured, random, vectors.layers),
        prediction=prediction(measured, vectors.layers, others),
        spread=compared,
        command=command_line,
        notes=notes,
    )


def scaled(
    context: Context, held_out: HeldOut, kind: str, vectors: Mapping[int, Any], kl: float, folder: Path
) -> Interventions:
    """Vectors that are each scaled to this KL; their strengths are saved in `strengths.json`."""

    def job(layer: int) -> Job:
        def run(_: Sequence[Any]) -> list[Mapping[str, Any]]:
            strength = strength_at(context.model, held_out, {layer: vectors[layer]}, kl)
            return [{"kind": kind, "layer": layer, "strength": strength}]

        return Job(f"{kind} at layer {layer}", [(kind, layer)], run)

    records = records_of([job(layer) for layer in vectors], folder / "strengths.json", ("kind", "layer"), "Strengths")
    strengths = {record["layer"]: record["strength"] for record in records if record["kind"] == kind}
    return Interventions({layer: strengths[layer] * vector_D for layer, vector_D in vectors.items()}, strengths)


def _margins_of(
    records: Sequence[Mapping[str, Any]], ours: Sequence[Set], theirs: Sequence[Set]
) -> tuple[Margins, Margins]:
    """Margins for the sets of vectors and for the sets of controls."""
    values = {(record["kind"], record["set"]): np.array(record["margins"]) for record in records}
    return {of: values[VECTOR, name_of(of)] for of in ours}, {of: values[CONTROL, name_of(of)] for of in theirs}


def _job(context: Context, held_out: HeldOut, kind: str, vectors: Interventions, of: Set) -> Job:
    name = name_of(of)

    def run(_: Sequence[Any]) -> list[Mapping[str, Any]]:
        values = margins(context.model, held_out, vectors.vectors, of)
        return [{"kind": kind, "set": name, "margins": values.tolist()}]

    return Job(f"{kind} {name}", [(kind, name)], run)


def name_of(of: Set) -> str:
    """The name of a set in the file: `4+ 12-`, or `nothing`."""
    return " ".join(f"{layer}{'+' if sign > 0 else '-'}" for layer, sign in sorted(of)) or "nothing"


def spread(
    context: Context, held_out: HeldOut, vectors: Interventions, effects: Mapping[int, float], kl: float
) -> Spread:
    """Compare the best layer with the three best, at one KL, on the test rows."""
    best = sorted(effects, key=lambda layer: -effects[layer])[:SPREAD]
    several = {layer: vectors.vectors[layer] for layer in best}
    scale = strength_at(context.model, held_out, several, kl)
    test = context.held_out(TEST)
    scaled = {layer: scale * vector_D for layer, vector_D in several.items()}
    all_of: Set = frozenset((layer, 1) for layer in best)
    one_of: Set = frozenset({(best[0], 1)})
    on_test = {
        NOTHING: margins(context.model, test, scaled, NOTHING),
        one_of: margins(context.model, test, vectors.vectors, one_of),
        all_of: margins(context.model, test, scaled, all_of),
    }
    single, together = effect(on_test, one_of), effect(on_test, all_of)
    return Spread(
        best[0], sorted(best), scale, float(single.mean()), float(together.mean()), interval(together - single)
    )


def _json(result: MapResult) -> dict[str, Any]:
    prediction = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in asdict(result.prediction).items()
    }
    return {**asdict(result), "prediction": prediction}


if __name__ == "__main__":
    sys.exit(main())
