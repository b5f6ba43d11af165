"""Effects and side effects of steering side by side: accuracy, KL, perplexity and repetition, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure as Drawing

from steertune.recipes.lab import measures
from steertune.recipes.lab.intervals import Interval, of_measure
from steertune.recipes.lab.measures import Seen
from steertune.recipes.lab.pages import Block, Figure, Text, table_of
from steertune.recipes.lab.pages.drawing import error_bars, tidy
from steertune.recipes.lab.rows import Record

BESIDE = ("accuracy", "behaviour", "fidelity", "kl", "perplexity_ratio", "repetition", "neutral_repetition")
"""Effects, then side effects, as far as they were measured."""
_COLUMNS = 3
CAPTION = (
    "Effect and side effects, each with its 95 % interval for other examples. KL and perplexity are those of neutral "
    "text, repetition is the share of word triples that occur earlier in the same generated answer."
)


def with_ends(mean: Interval | None) -> str:
    """An estimate with the ends of its interval, for a table cell; empty if it was not measured."""
    if mean is None:
        return ""
    unknown = np.isinf([mean.low, mean.high]).any()
    return f"{_short(mean.estimate)} [{'unknown' if unknown else f'{_short(mean.low)}, {_short(mean.high)}'}]"


def side_effects(seen: Mapping[str, Seen], what: str = "strength", name: str = "side_effects") -> list[Block]:
    """A table and a figure, from the observations at each strength or of each model. Strengths are drawn on a numeric
    axis, models side by side."""
    intervals = {at: {one: of_measure(measures.get(one), of) for one in BESIDE} for at, of in seen.items()}
    names = [one for one in BESIDE if any(row[one] is not None for row in intervals.values())]
    if not names:
        return []
    rows = [[at, *(with_ends(row[one]) for one in names)] for at, row in intervals.items()]
    header = [what, *(measures.get(one).heading for one in names)]
    alt = f"{', '.join(measures.get(one).title for one in names)} by {what}"
    drawing = _figure(intervals, names, what)
    return [Text(CAPTION), table_of(header, rows, name), Figure(drawing, name, alt)]


def of_strengths(record: Record, strengths: Sequence[str] | None = None) -> list[Block]:
    """The table and the figure of one model at several strengths, by default all that were measured."""
    labels = sorted(record.observations if strengths is None else strengths, key=float)
    return side_effects({at: record.seen(at) for at in labels})


def _figure(intervals: Mapping[str, Mapping[str, Interval | None]], names: Sequence[str], what: str) -> Drawing:
    """One panel per measure, with error bars."""
    rows = -(-len(names) // _COLUMNS)
    figure = Drawing(figsize=(9, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    numeric = what == "strength"
    for axis, name in zip(axes, names, strict=False):
        points = {at: one for at, row in intervals.items() if (one := row[name]) is not None}
        x = [float(at) for at in points] if numeric else [[*intervals].index(at) for at in points]
        error_bars(axis, x, [*points.values()], fmt="o-" if numeric else "o", capsize=2, linewidth=1.2)
        if numeric:
            axis.axvline(0, color="grey", linewidth=0.8)
            axis.set_xlabel(what)
        else:
            axis.set_xticks(range(len(intervals)), [*intervals], fontsize=8)
            axis.set_xlim(-0.5, len(intervals) - 0.5)
        axis.set_title(measures.get(name).heading, fontsize=9)
        tidy(axis)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    return figure


def _short(value: float) -> str:
    return f"{value:.3f}" if value == 0 or 0.1 <= abs(value) < 1000 else f"{value:#.2g}"
