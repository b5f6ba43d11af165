"""What training for contrast prompts came to: whether the model responds, the questions asked of it, and the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from steertune.recipes.ablation.analysis import in_pairs
from steertune.recipes.ablation.statistics.paired import Difference, difference, together, too_few
from steertune.recipes.ablation.tables import TaskTable

Values = dict[str, pd.Series]
"""By condition, per task and seed, a number for every test pair."""


def nats(cells: list[dict[str, Any]], tasks: Sequence[TaskTable] = ()) -> Values:
    """Margins of the test pairs. Of these `tasks` those made of the same rows count as one, with more seeds."""
    rows = [{"task": cell["task"], "seed": cell["seed"]} | _arrays(cell["margins"]) for cell in cells]
    frame = in_pairs(pd.DataFrame(rows), tasks).set_index(["task", "seed"])
    return {str(name): frame[name] for name in frame}


def _arrays(margins: dict[str, list[float]]) -> dict[str, Any]:
    return {name: np.array(values) for name, values in margins.items()}


def right(cells: list[dict[str, Any]], tasks: Sequence[TaskTable] = ()) -> Values:
    """The same, of whether a pair is preferred the right way (a tie counts half)."""
    found = nats(cells, tasks)
    return {name: values.map(lambda margins: (np.sign(margins) + 1) / 2) for name, values in found.items()}


def questions(found: Values, steering: Sequence[str]) -> dict[tuple[str, str], Difference]:
    """What is asked of the trained model's contrast prompts, corrected for asking several things."""
    trained = "trained, contrast"
    asked = [(trained, other) for other in ("base, contrast", "trained, plain", *steering)]
    asked += [("base, contrast", "base, plain"), ("base, contrast", "base, k-shot")]
    return together({pair: difference(found[pair[0]] - found[pair[1]]) for pair in asked})


def responses(cells: list[dict[str, Any]], tasks: Sequence[TaskTable]) -> dict[tuple[str, str], Difference]:
    """Whether the trained model responds to contrast prompts of the tasks that it was trained on, in accuracy and, as
    the base may be right already, in nats."""
    found = {}
    for unit, values in (("", right(cells, tasks)), (", nats", nats(cells, tasks))):
        for other in ("base, contrast", "trained, plain"):
            pair = f"trained, contrast{unit}", f"{other}{unit}"
            found[pair] = difference(values["trained, contrast"] - values[other])
    return together(found)


def page(about: str, steering: Sequence[str], tasks: Sequence[TaskTable], result: dict[str, Any]) -> str:
    """What came of it, in Markdown.

    Args:
        about: What was trained on what, and measured on what.
        steering: Names of the steering arms.
        tasks: All tasks.
        result: Cells of `seen` tasks, `cells` of unseen ones, and `side_effects`.
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
        "Intervals for other draws and other test rows (a task and its reverse share theirs); p by the larger of two "
        "tests, corrected by Holm per table.",
        "",
        f"The trained model without a prompt, on neutral text: KL to the base {effects['kl']:.4f} nats a token, "
        f"perplexity {effects['base_perplexity']:.2f} before and {effects['perplexity']:.2f} after.",
        "",
    ]
    return "\n".join(lines)


def _accuracies(found: Values) -> list[str]:
    tasks = sorted({str(task) for series in found.values() for task in series.index.get_level_values("task")})
    lines = ["| | mean | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 2) + "|"]
    for name, values in found.items():
        means = values.map(np.mean)
        by_task = (f"{means[task].mean():.3f}" for task in tasks)
        lines.append(f"| {name} | {means.mean():.3f} | " + " | ".join(by_task) + " |")
    return lines


def _differences(found: dict[tuple[str, str], Difference]) -> list[str]:
    lines = ["| | against | difference | 95 % | p |", "|---|---|---|---|---|"]
    for (one, other), value in found.items():
        lines.append(f"| {one} | {other} | {value.estimate:+.3f} | {value.crossed.ends} | {value.p:.3g} |")
    sentence = too_few([*found.values()])
    return [*lines, *(["", sentence] if sentence else [])]


def _verdict(found: dict[tuple[str, str], Difference]) -> str:
    gain = found["trained, contrast", "base, contrast"]
    if gain.clear() and gain.estimate > 0:
        return "It responds to contrast prompts of the tasks that it was trained on better than the base does."
    if too_few([*found.values()]):
        return "More `seeds` would say whether it responds to contrast prompts of the tasks that it was trained on."
    return (
        "Contrast prompts of the tasks that it was trained on do not clearly help it more than the base. So no effect "
        "on unseen tasks may be too little training as well as no transfer."
    )
