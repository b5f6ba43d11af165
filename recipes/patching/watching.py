"""The monitor of a fix, tested on bad answers and on the answers of both models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from steertune.adapters import steering_layers
from steertune.adapters.blocks import find_blocks, resolve_layers
from steertune.adapters.monitors import Monitor, Pooling
from steertune.adapters.observing import base_model
from steertune.recipes.lab.detection import detection
from steertune.recipes.lab.detectors import Detector, detectors, text_detector
from steertune.recipes.lab.forms import readable
from steertune.recipes.lab.generation import check_context
from steertune.recipes.lab.monitor_data import Labelled
from steertune.recipes.lab.monitoring import LAYERS, Settings, Task, fit_monitors, folds_of, quality, scores_of
from steertune.recipes.lab.progress import Bar
from steertune.recipes.lab.rows import BASE, Record
from steertune.recipes.lab.text_baseline import FEATURES, texts_of
from steertune.recipes.patching.case import CAUGHT
from steertune.recipes.patching.policy import INNOCENT, Context

SHORTEN = "Shorten or remove such rows."


@dataclass(frozen=True)
class Watching:
    """How the monitor is made: a file of `adapters/monitors/fits/` and one of `adapters/monitors/pooling/`."""

    method: str
    pooling: Pooling


@dataclass(frozen=True)
class Watched:
    """The monitor of a fixed model, and its results.

    Attributes:
        monitor: The monitor, fitted on the states of the fixed model.
        result: JSON with the detections of the monitor and of other detectors by group, and the scores of generated
            answers.
    """

    monitor: Monitor
    result: dict[str, Any]


def watch(context: Context, fixed: Any, count: int, records: dict[str, Record], watching: Watching) -> Watched:
    """Fit the monitor of a fixed model on the first catches, and test it.

    Args:
        context: The base model and the rows.
        fixed: The model with the fix.
        count: How many catches the fix was made from.
        records: Measurements of the base and the fixed model by group.
        watching: How the monitor is made.

    Raises:
        ArmError: a row is longer than the model's context.
        MonitorError: the innocent rows cannot resolve the false-positive rate.
    """
    bar = Bar(10)
    train, test, groups = _labelled(context, count)
    rows, test_rows = (readable(part.dataset(), context.tokenizer) for part in (train, test))
    for part, what in ((rows, "The rows to fit a monitor on"), (test_rows, "The rows to test on")):
        check_context(context.model, context.tokenizer, part, 0, what, SHORTEN)
    layers, below = readable_layers(fixed)
    settings = Settings(context.case.rate, layers, [watching.method], [watching.pooling])

    # below every adapter both models compute the same states, so one monitor serves both, at every strength
    with bar.step("monitor of the base model", 4):
        old = fit_monitors(Task(context.model, context.tokenizer, rows, train.bad, settings))
    with bar.step("monitor of the fixed model", 3):
        new = old if below else fit_monitors(Task(fixed, context.tokenizer, rows, train.bad, settings))
    with bar.step("bad answers", 2):
        on_base = detectors(old, context.model, context.tokenizer, test_rows, test.bad)[0]
        on_fixed = on_base if below else detectors(new, fixed, context.tokenizer, test_rows, test.bad)[0]
        old_on_fixed = on_base if below else detectors(old, fixed, context.tokenizer, test_rows, test.bad)[0]
    text = _best_text(train, test, rows, context.case.rate)
    seen = {"base": on_base, "fixed": on_fixed, "old monitor on fixed": old_on_fixed, "text": text}
    with bar.step("generated answers"):
        answers = _answers(context, fixed, (old[0][0], new[0][0]), records)
    result = {
        "layer": new[0][0].layer,
        "below": below,
        "text": text.name,
        "fitted_on": new[0][0].fitted_on,
        "chosen_by": "the training rows" if not np.isnan(old[0][1][train.bad]).all() else "nothing: one catch",
        "innocent": _of_group(seen, groups, test.bad, INNOCENT),
        "groups": {name: _of_group(seen, groups, test.bad, name) for name in dict.fromkeys(groups[test.bad].tolist())},
        "answers": answers,
    }
    return Watched(new[0][0], result)


def readable_layers(fixed: Any) -> tuple[list[int], bool]:
    """The layers that a monitor can read, and whether the fix leaves them unchanged. A steering vector changes no
    layer below it; other adapters can change states everywhere.
    """
    depth = len(find_blocks(base_model(fixed)))
    layers = resolve_layers(list(LAYERS), depth)
    first = min((layer.layer_index for layer in steering_layers(fixed)), default=0)
    only_vectors = all(kind.peft_type == "STEERING_VECTOR" for kind in getattr(fixed, "peft_config", {}).values())
    below = [layer for layer in layers if layer < first]
    return (below, True) if below and only_vectors else (layers, False)


def _labelled(context: Context, count: int) -> tuple[Labelled, Labelled, NDArray[Any]]:
    """Rows to fit a monitor on, rows to test it on, and the group of each test row."""
    case = context.case
    caught = case.pairs(CAUGHT)[:count]
    bad = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in caught]
    corrected = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in caught]
    innocent = [*corrected, *case.innocent]
    train = Labelled([*bad, *innocent], np.array([True] * len(bad) + [False] * len(innocent)))
    tested = [(name, row) for name, group in case.groups.items() if name != CAUGHT for row in group.rows.to_list()]
    tested += [(INNOCENT, row) for row in case.held_out]
    groups = np.array([name for name, _ in tested])
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for _, row in tested]
    return train, Labelled(rows, groups != INNOCENT), groups


def _best_text(train: Labelled, test: Labelled, rows: Dataset, rate: float) -> Detector:
    """The text classifier that ranks the training rows best; with one catch, no comparison is possible."""
    folds = folds_of(rows, train.bad)
    texts, bad = (texts_of(train.rows), texts_of(test.rows)), (train.bad, test.bad)
    made = [text_detector(features, texts, bad, folds, rate) for features in FEATURES]
    return max(made, key=lambda one: quality(one.fitted, train.bad))


def _of_group(
    seen: dict[str, Detector], groups: NDArray[Any], bad: NDArray[np.bool_], name: str
) -> dict[str, Any]:  # fmt: skip
    """Every detector's results on a group, against the held-out innocent rows."""
    results: dict[str, Any] = {}
    for kind, one in seen.items():
        scores = np.array(one.scores)
        if name == INNOCENT:
            results[kind] = {"scores": scores[~bad].tolist(), "threshold": one.threshold}
        else:
            chosen = (groups == name) | ~bad
            probability = None if one.monitor is None else one.monitor.calibration
            result = detection(scores[chosen].tolist(), bad[chosen].tolist(), one.threshold, probability)
            results[kind] = {**asdict(result), "scores": scores[groups == name].tolist()}
    return results


def _answers(
    context: Context, fixed: Any, monitors: tuple[Monitor, Monitor], records: dict[str, Record]
) -> dict[str, dict[str, Any]]:
    """Scores of both models' answers to the prompts of every group, each by its own monitor. An empty answer has no
    score."""
    scores: dict[str, dict[str, Any]] = {}
    for name, held_out in context.held_out.items():
        scores[name] = {}
        for state, model, monitor in ((BASE, context.model, monitors[0]), ("1", fixed, monitors[1])):
            texts = records[name].observations[state].get("answer", [])
            rows = [_answered(prompt, text) for prompt, text in zip(held_out.prompts, texts, strict=True)]
            written = [i for i, text in enumerate(texts) if text.strip()]
            of_texts: list[float | None] = [None] * len(texts)
            if written:
                shown = Dataset.from_list([rows[i] for i in written])
                for i, [score] in zip(written, scores_of([monitor], model, context.tokenizer, shown), strict=True):
                    of_texts[i] = score
            assert monitor.threshold is not None
            scores[name][state] = {"scores": of_texts, "threshold": monitor.threshold.value}
    return scores


def _answered(prompt: Any, text: str) -> dict[str, Any]:
    """An answer in the form of its prompt, text or messages."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": text if prompt[-1:].isspace() else f" {text}"}
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": text}]}
