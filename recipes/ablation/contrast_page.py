"""The page of `contrast_prompts`: does the model respond to contrast prompts, of seen tasks and of unseen ones?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from steertune.recipes.ablation.analysis import in_pairs
from steertune.recipes.ablation.statistics.paired import Difference, difference, together, too_few
from steertune.recipes.ablation.tables import TaskTable

Values = dict[str, pd.Series]
"""Condition -> for every task and seed, one number per test pair."""


def nats(cells: list[dict[str, Any]], tasks: Sequence[TaskTable] = ()) -> Values:
    """Margins of the test pairs in nats.

    Args:
        cells: One per task and seed, with the margins of every condition.
        tasks: All tasks; those made of the same rows count as one task with more seeds.
    """
    rows = [
        {"task": cell["task"], "seed": cell["seed"]} | {name: np.array(m) for name, m in cell["margins"].items()}
        for cell in cells
    ]
    frame = in_pairs(pd.DataFrame(rows), tasks).set_index(["task", "seed"])
    return {str(name): frame[name] for name in frame}


def right(cells: list[dict[str, Any]], tasks: Sequence[TaskTable] = ()) -> Values:
    """Whether each pair is in the right order: 1 or 0, and a half for a tie; arguments as of `nats`."""
    margins = nats(cells, tasks)
    return {name: values.map(lambda m: (np.sign(m) + 1) / 2) for name, values in margins.items()}


def questions(values: Values, steering: Sequence[str]) -> dict[tuple[str, str], Difference]:
    """The comparisons on unseen tasks, corrected for their number.

    Args:
        values: See `right`.
        steering: Names of the steering arms.
    """
    trained = "trained, contrast"
    pairs = [(trained, other) for other in ("base, contrast", "trained, plain", *steering)]
    pairs += [("base, contrast", "base, plain"), ("base, contrast", "base, k-shot")]
    return together({pair: difference(values[pair[0]] - values[pair[1]]) for pair in pairs})


def responses(cells: list[dict[str, Any]], tasks: Sequence[TaskTable]) -> dict[tuple[str, str], Difference]:
    """Whether the trained model responds to contrast prompts of the tasks that it was trained on.

    Compared in accuracy and, because the base may already be right, in nats.
    """
    differences = {}
    for unit, values in (("", right(cells, tasks)), (", nats", nats(cells, tasks))):
        for other in ("base, contrast", "trained, plain"):
            pair = f"trained, contrast{unit}", f"{other}{unit}"
            differences[pair] = difference(values["trained, contrast"] - values[other])
    return together(differences)


def page(about: str, steering: Sequence[str], tasks: Sequence[TaskTable], result: dict[str, Any]) -> str:
    """The page in Markdown.

    Args:
        about: What was trained and measured on which data.
        steering: Names of the steering arms.
        tasks: All tasks.
        result: Cells of the `seen` tasks, `cells` of the unseen ones, and `side_effects`.
    """
    effects, response = result["side_effects"], responses(result["seen"], tasks)
    lines = [
        "# Training a model to respond to contrast prompts",
        "",
        about,
        "",
        "## Held-out pair accuracy on the tasks that it was trained on",
        "",
        *_accuracies(right(result["seen"])),
        "",
        *_differences(response),
        "",
        _verdict(response),
        "",
        "## Held-out pair accuracy on unseen tasks",
        "",
        *_accuracies(right(result["cells"])),
        "",
        *_differences(questions(right(result["cells"], tasks), steering)),
        "",
        "Intervals are for other draws and other test rows (a task and its reverse share theirs). p is the larger of "
        "two tests, corrected by Holm within a table.",
        "",
        f"Without a prompt, the trained model has a KL of {effects['kl']:.4f} nats per token to the base on neutral "
        f"text, perplexity {effects['base_perplexity']:.2f} before and {effects['perplexity']:.2f} after.",
        "",
    ]
    return "\n".join(lines)


def _accuracies(conditions: Values) -> list[str]:
    tasks = sorted({str(task) for series in conditions.values() for task in series.index.get_level_values("task")})
    lines = ["| | mean | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 2) + "|"]
    for name, values in conditions.items():
        means = values.map(np.mean)
        by_task = (f"{means[task].mean():.3f}" for task in tasks)
        lines.append(f"| {name} | {means.mean():.3f} | " + " | ".join(by_task) + " |")
    return lines


def _differences(differences: dict[tuple[str, str], Difference]) -> list[str]:
    lines = ["| | against | difference | 95 % | p |", "|---|---|---|---|---|"]
    for (one, other), value in differences.items():
        lines.append(f"| {one} | {other} | {value.estimate:+.3f} | {value.crossed.ends} | {value.p:.3g} |")
    sentence = too_few([*differences.values()])
    return [*lines, *(["", sentence] if sentence else [])]


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
