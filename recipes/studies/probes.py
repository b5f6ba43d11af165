"""What directions read: accuracy, ranking and calibration on held-out answers, before and after erasing the concept.

    python -m steertune.recipes.studies.probes cautious_advice --folder runs/probes

Every direction of `adapters/directions/` is fitted at every layer on three quarters of the training pairs; the last
quarter chooses its layer. Then it is fitted on all of them, and read on the test pairs. The last column asks whether
anything linear is left: LEACE is fitted on the training pairs, and a new logistic probe on the erased states reads the
erased test states.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from steertune.adapters import directions
from steertune.adapters.analysis.activations import Activations, collect
from steertune.adapters.analysis.erasure import Eraser, erase
from steertune.adapters.analysis.probing import Pairs, Reading, read
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.command_line import Argument, Count, Option, Result, Threads, command
from steertune.recipes.lab.data import load_model, load_splits
from steertune.recipes.lab.files import ArmError, write_whole
from steertune.recipes.lab.paths import modules_in
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import progress, track
from steertune.recipes.lab.tables import DataTable, ModelTable

_BATCH = 4
METHODS = modules_in("adapters/directions")


@command
def main(
    task: Annotated[str, Argument(help="an embedded task, a path or a Hub name, as data.name")],
    model: Annotated[str, Option(help="embedded, a local folder or a Hub name")] = "embedded",
    train: Annotated[int, Count("training pairs (8 or more)")] = 32,
    test: Annotated[int, Count("test pairs")] = 40,
    methods: Annotated[list[str], Option(help="files of adapters/directions/", metavar="NAME ...")] = METHODS,
    threads: Threads = None,
    folder: Annotated[Path, Option(help="where the table is written")] = Path("runs/probes"),
) -> Result:
    """Fit every direction, read it on test pairs, and write the table."""
    begin(threads, only_one=True)
    with progress("Directions"):
        readings = probe(task, model, train, test, methods)
    table = summarise(task, train, test, readings)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "probes.json", json.dumps(readings, indent=1))
    write_whole(folder / "table.md", table)
    return Result(readings, table)


def probe(task: str, model_name: str, train: int, test: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Every method at the layer that the last quarter of the training pairs chose.

    Raises:
        ArmError: too few pairs, or no such task.
        ValueError: no such method.
    """
    if train < 8:
        raise ArmError(f"--train {train}: 8 pairs or more, of which a quarter chooses the layer.")
    methods = {name: directions.get(name) for name in names}
    rows = load_splits(DataTable(name=task, train=train, test=test))
    for part in rows:
        if not {"chosen", "rejected"} <= set(part.column_names):
            raise ArmError(f"{task!r}: directions are read from pairs, its rows have {part.column_names}.")
    model, tokenizer = load_model(ModelTable(name=model_name))
    states: dict[str, tuple[Activations, Activations]] = {}
    for pool in sorted({method.POOL for method in methods.values()}):
        made: list[Activations] = []
        for part in rows:
            given = [{**batch.inputs, "labels": batch.labels} for batch in batches(tokenizer, part, _BATCH)]
            made.append(collect(model, given, pool=pool))
        states[pool] = (made[0], made[1])
    return [
        {"method": name, **_best(method, *states[method.POOL])}
        for name, method in track([*methods.items()], "direction")
    ]


def _best(method: Any, train: Activations, test: Activations) -> dict[str, Any]:
    """Its layer, and how it reads there, with and without the concept."""
    cut = 3 * len(next(iter(train.chosen.values()))) // 4
    vectors = method.fit(*({i: x[:cut] for i, x in side.items()} for side in (train.chosen, train.rejected)))
    chooses = {i: read(v, _part(train, i, slice(cut)), _part(train, i, slice(cut, None))) for i, v in vectors.items()}
    layer = max(chooses, key=lambda i: (chooses[i].pair_accuracy, chooses[i].auroc, -i))
    fitted_on, held_out = _part(train, layer, slice(None)), _part(test, layer, slice(None))
    # ICV is one direction over all layers together
    everywhere = method.fit(train.chosen, train.rejected)
    eraser = erase(*fitted_on)
    left = LogisticRegression(max_iter=2000).fit(*_labelled(eraser, fitted_on))
    return {
        "layer": layer,
        **dataclasses.asdict(read(everywhere[layer], fitted_on, held_out)),
        "accuracy_erased": float(left.score(*_labelled(eraser, held_out))),
    }


def _labelled(eraser: Eraser, pairs: Pairs) -> tuple[Any, Any]:
    """Erased states of both sides, and which are chosen."""
    sides = [eraser(side).numpy() for side in pairs]
    return np.concatenate(sides), np.repeat([1, 0], [len(side) for side in sides])


def _part(states: Activations, layer: int, rows: slice) -> Pairs:
    return states.chosen[layer][rows], states.rejected[layer][rows]


def summarise(task: str, train: int, test: int, found: list[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    names = [field.name for field in dataclasses.fields(Reading)]
    lines = [
        f"# What directions read: {Path(task).name}",
        "",
        f"{train} training pairs, {test} test pairs.",
        "",
        "| direction | layer | " + " | ".join(name.replace("_", " ") for name in names) + " | accuracy, erased |",
        "|---" * (len(names) + 3) + "|",
    ]
    for row in sorted(found, key=lambda row: -row["pair_accuracy"]):
        values = [*(row[name] for name in names), row["accuracy_erased"]]
        lines.append(f"| `{row['method']}` | {row['layer']} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
