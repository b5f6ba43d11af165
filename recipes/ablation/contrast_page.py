"""The page of `contrast_prompts`: does the model respond to contrast prompts, of seen tasks and of unseen ones?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from steertune.recipes.ablation.analysis import in_pairs
from steertune.recipes.ablation.statistics.paired import Difference, difference, together, too_few
from steertune.recipes.ablation.tables import TaskTable
from steertune.recipes.lab.measures import Seen
from steertune.recipes.lab.pages import Block, Page, Section, Table, Text, table_of
from steertune.recipes.lab.pages.side_effects import side_effects
from steertune.recipes.lab.rows import BASE, Record

Values = dict[str, pd.Series]
"""Condition -> for every task and seed, one number per test pair."""


def values(records: Sequence[Record], measure: str, tasks: Sequence[TaskTable] = ()) -> Values:
    """A measure of the test pairs, from a record for every task, seed and condition. Those of `tasks` that are made of
    the same rows count as one task with more seeds."""
    rows = [{**record.keys, "rows": record.seen(1)[measure]} for record in records]
    table = in_pairs(pd.DataFrame(rows), tasks).pivot(index=["task", "seed"], columns="arm", values="rows")
    return {name: table[name] for name in dict.fromkeys(str(record.keys["arm"]) for record in records)}


def questions(accuracies: Values, steering: Sequence[str]) -> dict[tuple[str, str], Difference]:
    """Compare accuracy on unseen tasks with the base and every steering arm, corrected for their number."""
    trained = "trained, contrast"
    pairs = [(trained, other) for other in ("base, contrast", "trained, plain", *steering)]
    pairs += [("base, contrast", "base, plain"), ("base, contrast", "base, k-shot")]
    return together({pair: difference(accuracies[pair[0]] - accuracies[pair[1]]) for pair in pairs})


def responses(records: Sequence[Record], tasks: Sequence[TaskTable]) -> dict[tuple[str, str], Difference]:
    """Whether the trained model responds to contrast prompts of the tasks that it was trained on.

    Compared in accuracy and, because the base may already be right, in nats.
    """
    differences = {}
    for unit, measure in (("", "accuracy"), (", nats", "margin")):
        of_pairs = values(records, measure, tasks)
        for other in ("base, contrast", "trained, plain"):
            pair = f"trained, contrast{unit}", f"{other}{unit}"
            differences[pair] = difference(of_pairs["trained, contrast"] - of_pairs[other])
    return together(differences)


def page(
    about: str,
    steering: Sequence[str],
    tasks: Sequence[TaskTable],
    seen: Sequence[Record],
    unseen: Sequence[Record],
    effects: Record,
) -> Page:
    """The page: `about` says what was trained and measured on which data; `effects` are those of the trained model on
    neutral text."""
    response = responses(seen, tasks)
    comparisons = questions(values(unseen, "accuracy", tasks), steering)
    note = (
        "Intervals for other draws and other test rows (a task and its reverse share theirs); p by the larger of two "
        "tests, corrected by Holm per table."
    )
    seen_blocks = [
        _accuracies(values(seen, "accuracy"), "seen"),
        *_differences(response, "seen_differences"),
        Text(_verdict(response)),
    ]
    unseen_blocks = [
        _accuracies(values(unseen, "accuracy"), "unseen"),
        *_differences(comparisons, "unseen_differences"),
        Text(note),
    ]
    side_blocks = side_effects(_without_prompts(unseen, steering, effects), "model")
    sections = [
        Section("", [Text(about)]),
        Section("Held-out pair accuracy on the tasks that it was trained on", seen_blocks),
        Section("Held-out pair accuracy on unseen tasks", unseen_blocks),
        Section("Without a prompt: effect on unseen tasks, and side effects", side_blocks),
    ]
    return Page("Training a model to respond to contrast prompts", sections)


def _without_prompts(unseen: Sequence[Record], steering: Sequence[str], effects: Record) -> dict[str, Seen]:
    """What models do without a prompt: accuracy on the pairs of unseen tasks, and what they do to neutral text.

    Test pairs and neutral rows are the same in every draw, so their values are means over the draws.
    """
    base, trained = (_of_rows(unseen, f"{name}, plain", ["accuracy"]) for name in ("base", "trained"))
    models = {"base": Seen(base | effects.observations[BASE])}
    models["trained"] = Seen(trained | effects.observations["1"], models["base"])
    for arm in steering:
        names = ["accuracy", "neutral_kl", "neutral_nll", "neutral_tokens", "neutral_repetition"]
        models[arm] = Seen(_of_rows(unseen, arm, names), models["base"])
    return models


def _of_rows(records: Sequence[Record], condition: str, names: Sequence[str]) -> dict[str, list[float]]:
    """A condition's values for every row: of test pairs task after task, of neutral rows averaged over all records."""
    chosen = [record for record in records if record.keys["arm"] == condition]
    tasks = dict.fromkeys(record.keys["task"] for record in chosen)
    values = {}
    for name in names:
        of_task = [[r.seen(1)[name] for r in chosen if r.keys["task"] == task and name in r.seen(1)] for task in tasks]
        groups = of_task if name == "accuracy" else [[rows for of in of_task for rows in of]]
        values[name] = [float(value) for rows in groups if rows for value in np.mean(rows, axis=0)]
    return {name: rows for name, rows in values.items() if rows}


def _accuracies(accuracies: Values, name: str) -> Table:
    tasks = sorted({str(task) for series in accuracies.values() for task in series.index.get_level_values("task")})
    rows = []
    for condition, of_pairs in accuracies.items():
        means = of_pairs.map(np.mean)
        rows.append([condition, f"{means.mean():.3f}", *(f"{means[task].mean():.3f}" for task in tasks)])
    return table_of(["", "mean", *tasks], rows, name)


def _differences(differences: dict[tuple[str, str], Difference], name: str) -> list[Block]:
    rows = [
        [one, other, f"{value.estimate:+.3f}", value.crossed.ends, f"{value.p:.3g}"]
        for (one, other), value in differences.items()
    ]
    table = table_of(["", "against", "difference", "95 %", "p"], rows, name)
    sentence = too_few([*differences.values()])
    return [table, *([Text(sentence)] if sentence else [])]


def _verdict(differences: dict[tuple[str, str], Difference]) -> str:
    gain = differences["trained, contrast", "base, contrast"]
    if gain.clear() and gain.estimate > 0:
        return "It responds to contrast prompts of the tasks that it was trained on, and better than the base does."
    if too_few([*differences.values()]):
        return "More `seeds` are needed to say whether it responds to contrast prompts of the tasks it was trained on."
    return (
        "Contrast prompts of the tasks that it was trained on do not clearly help it more than the base. If there is "
        "no effect on unseen tasks, the reason may be too little training as well as no transfer."
    )
