"""Blocks of a page about monitors: their results, those of the text alone, scores, rows to review, drift."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Drawing
from numpy.typing import NDArray

from steertune.recipes.lab.detection import Drift, auroc_difference
from steertune.recipes.lab.detectors import Detector
from steertune.recipes.lab.intervals import Interval
from steertune.recipes.lab.pages import Block, Code, Figure, Section, Table, Text, escape
from steertune.recipes.lab.pages.side_effects import with_ends
from steertune.recipes.lab.similarity import text_of

LISTED = 5
"""Number of rows of each kind that a page shows."""
_LONGEST = 300  # characters of a prompt or an answer
_MANY = 1e-3


def summary(best: Detector, text: Detector | None, bad: NDArray[np.bool_]) -> str:
    """The first paragraph: the result of the monitor, and whether it beats a text classifier.

    Args:
        best: The monitor chosen on the training rows.
        text: The text classifier chosen on the training rows, if any.
        bad: Whether each held-out row is bad.
    """
    assert best.monitor is not None and best.monitor.threshold is not None
    rate = best.monitor.threshold.false_positive_rate
    if best.result is None:
        missing = "bad" if not bad.any() else "innocent"
        return (
            f"**No {missing} row was held out, so nothing is known of new ones.** The monitor ({best.name}) has a "
            f"threshold for a false-positive rate of {rate:g}. Give more rows, or rows to test on: `--test`."
        )
    result = best.result
    P, N = int(bad.sum()), int((~bad).sum())
    line = (
        f"**The monitor ({best.name}) flags {result.recall.estimate * P:.0f} of {P} held-out bad rows** "
        f"({_percent(result.recall)}) at a threshold for a false-positive rate of {rate:g}, and "
        f"{result.false_positives.estimate * N:.0f} of {N} held-out innocent rows "
        f"({_percent(result.false_positives)})."
    )
    return line if text is None or text.result is None else f"{line} {_beside(best, text, bad)}"


def _beside(best: Detector, text: Detector, bad: NDArray[np.bool_]) -> str:
    """The comparison of the monitor with the text classifier."""
    assert best.result is not None and text.result is not None
    gap = auroc_difference(best.scores, text.scores, bad)
    both = (
        f"{text.name} has an AUROC of {text.result.auroc.estimate:.3f}, the monitor {best.result.auroc.estimate:.3f} "
        f"(difference {gap})"
    )
    if gap.low > 0:
        return f"It ranks them better than the text alone: {both}."
    if gap.high < 0:
        return f"**The text alone ranks them better**: {both}. Use a filter of words."
    return f"**The text alone may do as well**: {both}. Nothing here shows that the model's states tell more."


def table_of(detectors: Sequence[Detector], name: str = "detectors") -> Table:
    """One row for every detector: its result on the held-out rows."""
    rows = []
    for one in detectors:
        result = one.result
        cells = ["" for _ in range(5)]
        if result is not None:
            cells = [with_ends(result.auroc), with_ends(result.recall), with_ends(result.false_positives)]
            cells += [_number(result.brier), _number(result.calibration_error)]
        rows.append([one.name, *cells])
    columns = ["detector", "AUROC", "recall at its threshold", "false positives", "Brier", "calibration error"]
    return Table(pd.DataFrame(rows, columns=pd.Index(columns)), name)


def score_figure(detector: Detector, bad: NDArray[np.bool_], name: str = "scores") -> Figure:
    """The scores of held-out bad and innocent rows, and the threshold."""
    figure = Drawing(figsize=(7, 2.8), layout="constrained")
    axis = figure.subplots()
    scores = np.array(detector.scores)
    edges = np.histogram_bin_edges(scores, bins=30)
    for kind, chosen in (("innocent", ~bad), ("bad", bad)):
        if chosen.any():
            weights = np.full(int(chosen.sum()), 1 / chosen.sum())
            axis.hist(scores[chosen], bins=edges.tolist(), weights=weights, alpha=0.6, label=kind)
    axis.axvline(detector.threshold, color="black", linewidth=1, linestyle="--", label="threshold")
    axis.set_xlabel("score, in standard deviations of innocent rows")
    axis.set_ylabel("share of rows")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return Figure(figure, name, "Scores of held-out bad and innocent rows, and the threshold")


def rows_to_review(detector: Detector, rows: Sequence[dict[str, Any]], bad: NDArray[np.bool_]) -> list[Block]:
    """Held-out innocent rows with the highest scores and bad rows with the lowest: false positives and misses, if they
    are on the wrong side of the threshold. An innocent row with a high score may be a bad one that was not caught."""
    scores = np.array(detector.scores)
    blocks: list[Block] = []
    for title, chosen, order in (
        ("Innocent rows with the highest scores", ~bad, -scores),
        ("Bad rows with the lowest scores", bad, scores),
    ):
        listed = [i for i in np.argsort(order, kind="stable") if chosen[i]][:LISTED]
        lines = [_line(rows[i], detector.scores[i], detector.scores[i] > detector.threshold) for i in listed]
        if lines:
            blocks += [Text(f"{title}:"), Text("\n".join(lines))]
    return blocks


def _line(row: dict[str, Any], score: float, flagged: bool) -> str:
    prompt, answer = (_cut(text_of(row[part])) for part in ("prompt", "completion"))
    return f"- {score:+.2f}{' (flagged)' if flagged else ''}: {escape(prompt)} → {escape(answer)}"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} [...]"


def drift_section(drift: Drift, names: tuple[str, str]) -> Section:
    """How the scores of two samples of traffic differ."""
    first, second = (escape(name) for name in names)
    chance = f"{drift.p:.3f}" if drift.p >= _MANY else f"below {_MANY:g}"
    moved = (
        "**The scores have moved**, so the threshold no longer stands for its false-positive rate. Fit it again on "
        "traffic of today, or look at what changed."
        if drift.p < 0.01
        else "Nothing here shows that the scores moved."
    )
    rows = [
        ["flagged", *map(with_ends, drift.flagged)],
        ["shift of the mean, in standard deviations", "", f"{drift.shift:+.2f}"],
        ["largest gap of the distributions (Kolmogorov-Smirnov)", "", f"{drift.distance:.3f}"],
        ["probability of such a gap in unchanged traffic", "", chance],
    ]
    frame = pd.DataFrame(rows, columns=pd.Index(["", first, second]))
    return Section("Drift", [Text(moved), Table(frame, "drift")])


def use_section(folder: Path, base: str) -> Section:
    """How to load a monitor."""
    model = "embedded.load_model(), embedded.load_tokenizer()" if base == "embedded" else "..., ...  # its base model"
    lines = [
        *(["from steertune.recipes.lab import embedded"] if base == "embedded" else []),
        "from steertune.adapters import monitors",
        "from steertune.recipes.lab.monitoring import scores_of",
        "",
        f"model, tokenizer = {model}",
        f'monitor = monitors.load("{folder}", model, tokenizer)',
        "scores = scores_of([monitor], model, tokenizer, rows)  # rows with prompt and completion",
        "flagged = [monitor.flags(score) for [score] in scores]",
    ]
    return Section("Use it", [Code("\n".join(lines), "python")])


def _percent(interval: Interval) -> str:
    if not np.isfinite([interval.low, interval.high]).all():
        return "unknown"
    return f"95 % interval {interval.low:.1%} to {interval.high:.1%}"


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}"
