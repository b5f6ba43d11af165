"""What training for contrast prompts came to: whether the model responds, the questions asked of it, and the page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from steertune.recipes.ablation.analysis import in_pairs
from steertune.recipes.ablation.statistics.paired import Difference, difference, together, too_few
from steertune.recipes.ablation.tables import TaskTable
from steertune.recipes.lab.pages import Block, Page, Section, Table, Text
from steertune.recipes.lab.rows import Record

Values = dict[str, pd.Series]
"""By condition, per task and seed, a number for every test pair."""


def values(records: Sequence[Record], measure: str, tasks: Sequence[TaskTable] = ()) -> Values:
    """A measure of the test pairs. Of these `tasks` those made of the same rows count as one, with more seeds."""
    rows = [{**record.keys, "rows": record.seen(1)[measure]} for record in records]
    table = in_pairs(pd.DataFrame(rows), tasks).pivot(index=["task", "seed"], columns="arm", values="rows")
    return {name: table[name] for name in dict.fromkeys(str(record.keys["arm"]) for record in records)}


def questions(accuracies: Values, steering: Sequence[str]) -> dict[tuple[str, str], Difference]:
    """What is asked of the trained model's contrast prompts, corrected for asking several things."""
    trained = "trained, contrast"
    asked = [(trained, other) for other in ("base, contrast", "trained, plain", *steering)]
    asked += [("base, contrast", "base, plain"), ("base, contrast", "base, k-shot")]
    return together({pair: difference(accuracies[pair[0]] - accuracies[pair[1]]) for pair in asked})


def responses(records: Sequence[Record], tasks: Sequence[TaskTable]) -> dict[tuple[str, str], Difference]:
    """Whether the trained model responds to contrast prompts of the tasks that it was trained on, in accuracy and, as
    the base may be right already, in nats."""
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
    """What came of it.

    Args:
        about: What was trained on what, and measured on what.
        steering: Names of the steering arms.
        tasks: All tasks.
        seen: Records of the tasks that were trained on.
        unseen: Records of the others.
        effects: What the trained model does to neutral text.
    """
    response = responses(seen, tasks)
    asked = questions(values(unseen, "accuracy", tasks), steering)
    side_effects = (
        f"The trained model without a prompt, on neutral text: KL to the base {effects.value('kl', 1):.4f} nats a "
        f"token, perplexity {effects.value('perplexity'):.2f} before and {effects.value('perplexity', 1):.2f} after."
    )
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
        *_differences(asked, "unseen_differences"),
        Text(note),
        Text(side_effects),
    ]
    sections = [
        Section("", [Text(about)]),
        Section("Held-out pair accuracy on the tasks that it was trained on", seen_blocks),
        Section("Held-out pair accuracy on unseen tasks", unseen_blocks),
    ]
    return Page("Training a model to respond to contrast prompts", sections)


def _accuracies(accuracies: Values, name: str) -> Table:
    tasks = sorted({str(task) for series in accuracies.values() for task in series.index.get_level_values("task")})
    rows = []
    for condition, of_pairs in accuracies.items():
        means = of_pairs.map(np.mean)
        rows.append([condition, f"{means.mean():.3f}", *(f"{means[task].mean():.3f}" for task in tasks)])
    return Table(pd.DataFrame(rows, columns=pd.Index(["", "mean", *tasks])), name)


def _differences(differences: dict[tuple[str, str], Difference], name: str) -> list[Block]:
    rows = [
        [one, other, f"{value.estimate:+.3f}", value.crossed.ends, f"{value.p:.3g}"]
        for (one, other), value in differences.items()
    ]
    table = Table(pd.DataFrame(rows, columns=pd.Index(["", "against", "difference", "95 %", "p"])), name)
    sentence = too_few([*differences.values()])
    return [table, *([Text(sentence)] if sentence else [])]


def _verdict(differences: dict[tuple[str, str], Difference]) -> str:
    gain = differences["trained, contrast", "base, contrast"]
    if gain.clear() and gain.estimate > 0:
        return "It responds to contrast prompts of the tasks that it was trained on better than the base does."
    if too_few([*differences.values()]):
        return "More `seeds` would say whether it responds to contrast prompts of the tasks that it was trained on."
    return (
        "Contrast prompts of the tasks that it was trained on do not clearly help it more than the base. So no effect "
        "on unseen tasks may be too little training as well as no transfer."
    )
