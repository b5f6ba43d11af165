"""How well directions read the concept: accuracy, ranking and calibration on held-out answers, also after erasing it.

    python -m steertune.recipes.studies.probes cautious_advice --folder runs/probes

Every direction of `adapters/directions/` is fitted at every layer on three quarters of the training pairs, and the
last quarter chooses the layer. The direction is then fitted on all training pairs and scored on the test pairs. The
last column shows what remains linearly readable: LEACE is fitted on the training pairs, and a new logistic probe,
trained on the erased training states, is scored on the erased test states.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from steertune.adapters import directions
from steertune.adapters.analysis.activations import Activations, collect
from steertune.adapters.analysis.erasure import Eraser, erase
from steertune.adapters.analysis.probing import Pairs, Reading, read
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.checks import skeleton
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.data import load_data, load_model, model_has_template
from steertune.recipes.lab.files import ArmError, write_whole
from steertune.recipes.lab.forms import readable
from steertune.recipes.lab.generation import check_context
from steertune.recipes.lab.options import Argument, Count, Option, Threads
from steertune.recipes.lab.pair_lint import warn_of
from steertune.recipes.lab.paths import modules_in
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import progress, track
from steertune.recipes.lab.tables import DataTable, ModelTable

_BATCH = 4
METHODS = modules_in("adapters/directions")


@command
def main(
    task: Annotated[str, Argument(help="an embedded task, a path or a Hub name, like data.name")],
    model: Annotated[str, Option(help="embedded, a local folder or a Hub name")] = "embedded",
    train: Annotated[int, Count("training pairs, 8 or more")] = 32,
    test: Annotated[int, Count("test pairs")] = 40,
    methods: Annotated[list[str], Option(help="files of adapters/directions/", metavar="NAME ...")] = METHODS,
    threads: Threads = None,
    folder: Annotated[Path, Option(help="where the results are written")] = Path("runs/probes"),
) -> Result:
    """Fit every direction, score it on test pairs, and write the table."""
    begin(threads, only_one=True)
    with progress("Directions"):
        rows, sizes = probe(task, model, train, test, methods)
    table = summarise(task, *sizes, rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "probes.json", json.dumps(rows, indent=1))
    write_whole(folder / "table.md", table)
    return Result(rows, table)


def probe(
    task: str, model_name: str, train: int, test: int, names: Sequence[str]
) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """One row for every method, at the layer that the last quarter of the training pairs chose.

    Returns:
        The rows, and the numbers of training and test pairs, which are smaller if a single file has fewer.

    Raises:
        ArmError: too few pairs, no such task, or no such model.
        ValueError: no such method.
    """
    if train < 8:
        raise ArmError(f"--train {train}: 8 pairs or more are needed, because a quarter chooses the layer.")
    methods = {name: directions.get(name) for name in names}
    table = ModelTable(name=model_name)
    skeleton(table)  # refuses a missing model before rows are read
    data = load_data(DataTable(name=task, train=train, test=test), partial(model_has_template, table))
    for part in (data.train, data.test):
        if not {"chosen", "rejected"} <= set(part.column_names):
            raise ArmError(f"{task!r}: directions are fitted on pairs, but its rows have {part.column_names}.")
    if len(data.train) < 8 or not len(data.test):
        raise ArmError(f"{data.note} Directions need 8 training pairs and held-out ones: give more rows.")
    print(data.note, file=sys.stderr)
    warn_of(data.all_rows(), data.by, task)
    model, tokenizer = load_model(table)
    splits = (readable(data.train, tokenizer), readable(data.test, tokenizer))
    for part, what in zip(splits, ("The training rows", "The test rows"), strict=True):
        check_context(model, tokenizer, part, 0, what, "Shorten or remove such rows.")
    # states of the training and test pairs, pooled over tokens in every way that a method asks for
    states: dict[str, tuple[Activations, Activations]] = {}
    for pool in sorted({method.POOL for method in methods.values()}):
        pooled = []
        for part in splits:
            inputs = [{**batch.inputs, "labels": batch.labels} for batch in batches(tokenizer, part, _BATCH)]
            pooled.append(collect(model, inputs, pool=pool))
        states[pool] = (pooled[0], pooled[1])
    rows = [
        {"method": name, **_best(method, *states[method.POOL])}
        for name, method in track([*methods.items()], "direction")
    ]
    return rows, (len(data.train), len(data.test))


def _best(method: Any, train: Activations, test: Activations) -> dict[str, Any]:
    """The best layer of a method, and how well it reads there before and after erasing the concept."""
    # fit on three quarters of the training pairs, and choose the layer on the rest
    cut = 3 * len(next(iter(train.chosen.values()))) // 4
    vectors = method.fit(*({i: x[:cut] for i, x in side.items()} for side in (train.chosen, train.rejected)))
    readings = {i: read(v, _part(train, i, slice(cut)), _part(train, i, slice(cut, None))) for i, v in vectors.items()}
    layer = max(readings, key=lambda i: (readings[i].pair_accuracy, readings[i].auroc, -i))
    # fit again on all training pairs; at every layer, since ICV is one direction over all of them
    fitted_on, held_out = _part(train, layer, slice(None)), _part(test, layer, slice(None))
    vectors = method.fit(train.chosen, train.rejected)
    # what a new probe still reads once the concept is erased
    eraser = erase(*fitted_on)
    probe_after = LogisticRegression(max_iter=2000).fit(*_labelled(eraser, fitted_on))
    return {
        "layer": layer,
        **dataclasses.asdict(read(vectors[layer], fitted_on, held_out)),
        "accuracy_erased": float(probe_after.score(*_labelled(eraser, held_out))),
    }


def _labelled(eraser: Eraser, pairs: Pairs) -> tuple[Any, Any]:
    """Erased states of both answers, and a label: 1 for chosen, 0 for rejected."""
    sides = [eraser(side).numpy() for side in pairs]
    return np.concatenate(sides), np.repeat([1, 0], [len(side) for side in sides])


def _part(states: Activations, layer: int, rows: slice) -> Pairs:
    return states.chosen[layer][rows], states.rejected[layer][rows]


def summarise(task: str, train: int, test: int, rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    names = [field.name for field in dataclasses.fields(Reading)]
    lines = [
        f"# How well directions read the concept: {Path(task).name}",
        "",
        f"{train} training pairs, {test} test pairs.",
        "",
        "| direction | layer | " + " | ".join(name.replace("_", " ") for name in names) + " | accuracy, erased |",
        "|---" * (len(names) + 3) + "|",
    ]
    for row in sorted(rows, key=lambda row: -row["pair_accuracy"]):
        values = [*(row[name] for name in names), row["accuracy_erased"]]
        lines.append(f"| `{row['method']}` | {row['layer']} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
