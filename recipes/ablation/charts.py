"""The report's pictures, as PNG files: figures of their own, no display, no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.ablation.statistics.factorial import Effect
from steertune.recipes.ablation.statistics.paired import Interval, interval

_DPI = 160
_GREY = "#777777"


def intervals(values: Mapping[str, Interval], file: Path, label: str) -> None:
    """Estimates with intervals, one a row, largest on top; intervals that hold zero are grey."""
    rows = sorted(values.items(), key=lambda item: item[1].estimate)
    figure = Figure(figsize=(7, 0.7 + 0.36 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for y, (_, found) in enumerate(rows):
        colour = "C0" if found.excludes_zero else _GREY
        if np.isfinite([found.low, found.high]).all():
            axis.plot([found.low, found.high], [y, y], color=colour, linewidth=2, solid_capstyle="round")
        axis.plot(found.estimate, y, "o", color=colour)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.set_ylim(-0.6, len(rows) - 0.4)
    _plain(axis, xlabel=label)
    figure.savefig(file, dpi=_DPI)


def effects(found: Sequence[Effect], file: Path, label: str) -> None:
    """Matched effects of the factors' levels, with the intervals that allow for other test rows."""
    intervals({f"{e.factor}: {e.level} − {e.reference}": e.difference.crossed for e in found}, file, label)


def curves(cells: Frame, arms: Sequence[str], measure: str, file: Path, label: str) -> None:
    """Score against number of examples on a log axis, a panel a task, with intervals over seeds; the base dashed."""
    tasks = sorted(cells["task"].unique())
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.2 * columns + 1.6, 3.2 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, sharey=True)).ravel()
    colours, base = _colours(arms), f"{measure.partition('@')[0]}@0"
    for axis, task in zip(axes, tasks, strict=False):
        own = cells[cells["task"] == task]
        for shift, arm in enumerate(arms):
            points = own[own["arm"] == arm].dropna(subset=[measure]).groupby("examples")[measure]
            found = [(float(n), interval(values)) for n, values in points]  # pyright: ignore[reportArgumentType]
            if not found:
                continue
            n = np.array([x for x, _ in found]) * 1.03 ** (shift - len(arms) / 2)  # apart, so that bars can be seen
            y = np.array([i.estimate for _, i in found])
            ends = np.array([[i.low, i.high] for _, i in found])
            ends = np.where(np.isfinite(ends), ends, y[:, None])
            errors = np.abs(ends - y[:, None]).T
            axis.errorbar(n, y, yerr=errors, marker="o", markersize=4, linewidth=1.4, color=colours[arm], label=arm,
                          elinewidth=0.8)  # fmt: skip
        if base in own:
            axis.axhline(own[base].mean(), color=_GREY, linestyle="--", linewidth=1)
        sizes = sorted(own["examples"].unique())
        axis.set_xscale("log")
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.minorticks_off()
        _plain(axis, title=task, xlabel="examples")
    for axis in axes[len(tasks) :]:
        axis.set_visible(False)
    axes[0].set_ylabel(label)
    shown = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    named = [arm for arm in arms if arm in shown]
    figure.legend([shown[arm] for arm in named], named, loc="outside right center", fontsize=7, frameon=False)
    figure.savefig(file, dpi=_DPI)


def pareto(
    cells: Frame, x: str, y: str, file: Path, xlabel: str, ylabel: str, base: tuple[float, float] | None = None
) -> None:
    """Effect against side effect, a dot an arm (mean over its cells), a cross for the base model; the arms that no
    other beats on both are joined."""
    points = cells.groupby("arm", sort=False)[[x, y]].mean().dropna()
    if points.empty:
        return
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axis = figure.subplots()
    colours = _colours(list(points.index))
    for arm, point in points.iterrows():
        axis.plot(point[x], point[y], "o", color=colours[str(arm)], label=str(arm))
    if base is not None:
        axis.plot(*base, "x", color=_GREY, label="(base model)")
    ordered = points.sort_values([x, y], ascending=[True, False])
    front = ordered[ordered[y] > ordered[y].cummax().shift(fill_value=-np.inf)]
    axis.plot(front[x], front[y], color=_GREY, linewidth=0.8, zorder=0)
    _plain(axis, xlabel=xlabel, ylabel=ylabel)
    figure.legend(loc="outside right center", fontsize=7, frameon=False)
    figure.savefig(file, dpi=_DPI)


def _colours(arms: Sequence[str]) -> dict[str, Any]:
    palette = colormaps["tab10" if len(arms) <= 10 else "tab20"]
    return {arm: palette(i % palette.N) for i, arm in enumerate(arms)}


def _plain(axis: Axes, **labels: str) -> None:
    axis.set(**labels)  # pyright: ignore[reportArgumentType]
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
