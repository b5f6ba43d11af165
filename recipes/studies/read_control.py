"""Does the direction that reads a concept also control it, and is it needed? And which cheap number chooses the layer?

    steertune read_control cautious_advice warm_tone --layers 9 14 19
    steertune read_control my_pairs/ --directions mean_difference lda --read completion_mean last

Measures three things for every direction at every layer, on held-out pairs: read (area under the ROC curve and d',
compared with TF-IDF of the text), control (the margin gained at one KL to the base), silence (the share of an
instruction's effect that is gone when the direction is projected out there and above), each compared with random
directions. Five numbers that need no steering are judged by how much control is lost when they choose direction and
layer. Last, control is measured along the arc from the best reader to the best controller. A unit is a task with a
seed. Existing records are not measured again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, cast

import numpy as np
from sklearn.metrics import roc_auc_score

from steertune.adapters.analysis.activations import Activations, Pool
from steertune.recipes.lab.behaviours import read_behaviour
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.observe import FEW_NEUTRAL, neutral_rows
from steertune.recipes.lab.options import LAYERS, Argument, Choice, Count, Layers, Option, Threads
from steertune.recipes.lab.pages import write_page
from steertune.recipes.lab.paths import modules_in
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import progress
from steertune.recipes.lab.resumable import Job, records_of
from steertune.recipes.lab.text_baseline import FEATURES, text_scores, texts_of
from steertune.recipes.studies.reading.directions import RANDOM, arc, fitted, states_of
from steertune.recipes.studies.reading.jobs import Bench, Pairs, read
from steertune.recipes.studies.reading.page import page_of
from steertune.recipes.studies.reading.predictors import agreement, logit_lens, mean_gradients
from steertune.recipes.sweeping.context import TEST, Context
from steertune.recipes.sweeping.request import as_typed, request

KEYS = ("task", "seed", "read", "layer", "direction")
ARC = ("task", "seed", "degrees")
DIRECTIONS: list[str] = ["mean_difference", "lda", "probe", "sgd_probe", "lat"]
POOLS: list[str] = ["completion_mean", "last"]


@command
def main(
    tasks: Annotated[list[str], Argument(help="embedded tasks, paths or Hub names: preference pairs")],
    directions: Annotated[
        list[str], Choice(modules_in("adapters/directions"), "how directions are computed", metavar="NAME ...")
    ] = DIRECTIONS,
    layers: Layers = LAYERS,
    reads: Annotated[
        list[str], Choice(POOLS, "which tokens of an answer are read", "--read", metavar="POOL ...")
    ] = POOLS[:1],
    written: Annotated[str, Choice(["all", "completion", "prompt"], "which tokens are steered")] = "all",
    random: Annotated[int, Count("random directions at every layer")] = 3,
    kl: Annotated[float, Option(help="KL to the base at which directions are added, nats per token")] = 0.1,
    train: Annotated[int, Count("pairs that directions are computed from")] = 32,
    test: Annotated[int, Count("pairs that everything is measured on")] = 32,
    seeds: Annotated[list[int], Option(help="of the training rows and the random directions", metavar="N ...")] = [0],  # noqa: B006
    model: Annotated[str | None, Option(help="embedded, a local folder or a Hub name (embedded)")] = None,
    threads: Threads = None,
    folder: Annotated[Path, Option(help="where records and page are kept")] = Path("runs/read_control"),
    words: Sequence[str] = (),
) -> Result:
    """Measure what is missing, and write the page."""
    if not 0 < kl <= 1:
        raise ArmError(f"--kl {kl} must be a KL in nats per token, above 0 and at most 1.")
    begin(threads, only_one=True)
    units = []
    for task in tasks:
        for seed in seeds:
            options = SimpleNamespace(
                task=task, arm=None, direction=directions[0], layers=layers, sites=["block"], strengths=[1.0],
                columns=None, model=model, train=train, validation=8, test=test, seed=seed, scorer=None,
                scorer_rows=0, generations=0, new_tokens=1, max_kl=kl, max_perplexity=1.25, max_repetition=0.1,
            )  # fmt: skip
            table = request(options, [])  # refuses wrong layers and models before any work
            units.append(Unit(partial(Context, table), task, seed, directions, random, kl, written))
    records: list[dict[str, Any]] = []
    arcs: list[dict[str, Any]] = []
    with progress("Read, control, silence", len(units)) as bar:
        for unit in units:
            with bar.step(f"{unit.name}, seed {unit.seed}"):
                jobs = [job for pool in reads for job in unit.jobs(pool)]
                records = records_of(jobs, folder / "records.json", KEYS, "Directions")
                of_unit = [one for one in records if (one["task"], one["seed"]) == (unit.name, unit.seed)]
                arcs = records_of(unit.arc_jobs(of_unit), folder / "arcs.json", ARC, "Arc")
    page = write_page(page_of(records, arcs, kl, as_typed(words, "studies.read_control")), folder)
    result = {"records": records, "arcs": arcs}
    return Result(result, f"{page.read_text(encoding='utf-8')}\nThis page: {page}")


class Unit:
    """A task with a seed. The model is loaded, and directions are fitted, when the first job needs them.

    Args:
        make: Makes the context.
        task: The task.
        seed: Seed of the training rows and the random directions.
        methods: Files of `adapters/directions/`.
        random: Number of random directions at every layer.
        kl: The KL at which directions are added.
        written: The positions at which they are added.
    """

    def __init__(
        self, make: Callable[[], Context], task: str, seed: int, methods: Sequence[str], random: int, kl: float,
        written: str,
    ) -> None:  # fmt: skip
        self.make, self.task, self.seed, self.methods = make, task, seed, methods
        self.random, self.kl, self.written = random, kl, written
        self.name = Path(task).name
        self._read: dict[str, tuple[Activations, Activations, dict[str, dict[int, Any]]]] = {}

    @cached_property
    def context(self) -> Context:
        """The model and the rows."""
        context = self.make()
        context.rehearse()
        return context

    @cached_property
    def bench(self) -> Bench:
        """The pairs, neutral rows and instruction to measure on."""
        context = self.context
        matching = neutral_rows(context.tokenizer, "match", count=FEW_NEUTRAL)
        opposites = read_behaviour(self.task).opposites
        held_out = replace(context.held_out(TEST), matching=matching)
        return Bench(held_out, self.kl, "" if opposites is None else opposites.positive)

    def jobs(self, pool: str) -> list[Job]:
        """A job for each direction at each layer, with states pooled in one way."""
        names = [*self.methods, *(f"{RANDOM}{number}" for number in range(self.random))]
        return [
            Job(
                f"{name} at {layer}",
                [(self.name, self.seed, pool, layer, name)],
                partial(self._measured, pool, layer, name),
            )
            for layer in self.layers
            for name in names
        ]

    @cached_property
    def layers(self) -> list[int]:
        """The layers, lowest first."""
        return sorted(set(self.context.table.layers))

    def arc_jobs(self, records: Sequence[dict[str, Any]]) -> list[Job]:
        """Directions between the best reader and the best controller, at the layer of the best controller."""
        fixed = [one for one in records if not one["direction"].startswith(RANDOM)]
        best = max(fixed, key=lambda one: one["control"])
        at_layer = [one for one in fixed if (one["layer"], one["read"]) == (best["layer"], best["read"])]
        reader = max(at_layer, key=lambda one: (one["auroc"], one["d_prime"]))
        if reader is best:
            return []
        layer, pool = best["layer"], best["read"]
        _, test, vectors = self.read(pool)

        def run(degrees: float, vector_D: Any, _: Any) -> list[dict[str, Any]]:
            reading = read(vector_D, _of(test, layer))
            keys = {"task": self.name, "seed": self.seed, "degrees": degrees, "layer": layer}
            return [{**keys, **reading, **self.bench.control(vector_D, layer, self.written)}]

        between = arc(vectors[reader["direction"]][layer], vectors[best["direction"]][layer])
        return [
            Job(f"{degrees:g} degrees", [(self.name, self.seed, degrees)], partial(run, degrees, vector_D))
            for degrees, vector_D in between.items()
        ]

    def read(self, pool: str) -> tuple[Activations, Activations, dict[str, dict[int, Any]]]:
        """States of training and of test pairs, and the directions."""
        if pool not in self._read:
            model, tokenizer = self.context.model, self.context.tokenizer
            train, test = (states_of(model, tokenizer, rows, self.layers, cast(Pool, pool)) for rows in self.rows)
            self._read[pool] = train, test, fitted(self.methods, train, self.random, self.seed)
        return self._read[pool]

    @cached_property
    def rows(self) -> tuple[Any, Any]:
        """Training and test pairs."""
        splits, table = self.context.splits, self.context.table
        return splits.train(table.train, table.seed), splits.test

    @cached_property
    def gradients(self) -> dict[int, Any]:
        """The gradient of the training pairs' margin at every layer."""
        return mean_gradients(self.context.model, self.context.tokenizer, self.rows[0], self.layers)

    @cached_property
    def text_auroc(self) -> float:
        """How well the text alone tells chosen from rejected answers: the better of two kinds of TF-IDF."""
        sides = [
            [{"prompt": row["prompt"], "completion": row[side]} for side in ("chosen", "rejected") for row in rows]
            for rows in (part.to_list() for part in self.rows)
        ]
        train, test = map(texts_of, sides)
        labels = [[i < len(part) // 2 for i in range(len(part))] for part in (train, test)]
        return max(
            float(roc_auc_score(labels[1], text_scores(features, train, labels[0], test))) for features in FEATURES
        )

    def _measured(self, pool: str, layer: int, name: str, _: Any) -> list[dict[str, Any]]:
        """Measure one direction at one layer."""
        train, test, vectors = self.read(pool)
        vector_D, gradient_D = vectors[name][layer], self.gradients[layer]
        model, tokenizer = self.context.model, self.context.tokenizer
        record = {"task": self.name, "seed": self.seed, "read": pool, "layer": layer, "direction": name}
        record |= read(vector_D, _of(test, layer))
        record["agreement"] = agreement(vector_D, _of(train, layer))
        record["logit_lens"] = logit_lens(model, tokenizer, self.rows[0], vector_D)
        record["gradient"] = float(vector_D @ gradient_D / max(float(gradient_D.norm()), 1e-12))
        record |= self.bench.control(vector_D, layer, self.written)
        record["silence"] = self.bench.silence(vector_D, layer)
        record["text_auroc"] = self.text_auroc
        return [{key: float(f"{v:.5g}") if isinstance(v, float | np.floating) else v for key, v in record.items()}]


def _of(states: Activations, layer: int) -> Pairs:
    return states.chosen[layer], states.rejected[layer]


if __name__ == "__main__":
    sys.exit(main())
