"""The figures of a report. Each is a separate `Figure`, without a display or global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steertune.recipes.ablation.statistics import Frame
from steertune.recipes.lab.intervals import Interval, interval
from steertune.recipes.lab.pages.drawing import GREY, error_bars, tidy

_WIDTH = 8.0


def colours(arms: Sequence[str]) -> dict[str, Any]:
    """Arm -> its colour, the same in every figure of a report."""
    palette = colormaps["tab10" if len(arms) <= 10 else "tab20"]
    return {arm: palette(i % palette.N) for i, arm in enumerate(arms)}


def intervals(values: Mapping[str, Interval], label: str, line: float = 0.0, largest_first: bool = True) -> Figure:
    """Estimates with intervals, one per row; intervals that contain zero are grey. `line` is a second value to compare
    with, drawn dashed. Without `largest_first`, rows keep their order, from the top."""
    rows = sorted(values.items(), key=lambda item: item[1].estimate) if largest_first else [*values.items()][::-1]
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.36 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for y, (_, row) in enumerate(rows):
        colour = "C0" if row.excludes_zero else GREY
        if np.isfinite([row.low, row.high]).all():
            axis.plot([row.low, row.high], [y, y], color=colour, linewidth=2, solid_capstyle="round")
        axis.plot(row.estimate, y, "o", color=colour)
    axis.axvline(0, color="black", linewidth=0.8)
    if line:
        axis.axvline(line, color="black", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.set_ylim(-0.6, len(rows) - 0.4)
    tidy(axis, xlabel=label)
    return figure


def curves(cells: Frame, arms: Sequence[str], measure: str, label: str, colours: Mapping[str, Any]) -> Figure:
    """Score against number of examples on a log axis, with a panel for each task and intervals over seeds; the base is
    dashed."""
    tasks = sorted(cells["task"].unique())
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(max(_WIDTH, 3.6 * columns), 3.2 * rows + 0.9), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, sharey=True)).ravel()
    base = f"{measure.partition('@')[0]}@0"
    for axis, task in zip(axes, tasks, strict=False):
        of_task = cells[cells["task"] == task]
        for shift, arm in enumerate(arms):
            apart = 1.03 ** (shift - len(arms) / 2)  # so that bars do not overlap
            _curve(axis, of_task[of_task["arm"] == arm], measure, arm, apart, colours[arm])
        if base in of_task:
            axis.axhline(of_task[base].mean(), color=GREY, linestyle="--", linewidth=1)
        sizes = sorted(of_task["examples"].unique())
        axis.set_xscale("log")
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.minorticks_off()
        tidy(axis, title=task, xlabel="examples")
    for axis in axes[len(tasks) :]:
        axis.set_visible(False)
    axes[0].set_ylabel(label)
    handles = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    named = [arm for arm in arms if arm in handles]
    _legend(figure, [handles[arm] for arm in named], named)
    return figure


def _curve(axis: Axes, cells: Frame, measure: str, arm: str, apart: float, colour: Any) -> None:
    points = {n: interval(values) for n, values in cells.dropna(subset=[measure]).groupby("examples")[measure]}
    if not points:
        return
    n = np.array([*points], dtype=float) * apart
    style = {"marker": "o", "linewidth": 1.4, "elinewidth": 0.8}
    error_bars(axis, n, [*points.values()], color=colour, label=arm, **style)


def side_by_side(cells: Frame, columns: Mapping[str, str], colours: Mapping[str, Any]) -> Figure:
    """Effect and side effects of every arm: a panel for each column, a row for each arm, with intervals over its
    cells; the base model is dashed. `columns` maps a column of the cells to its title."""
    arms = [*dict.fromkeys(cells["arm"])][::-1]  # the first one on top
    figure = Figure(figsize=(2.3 * len(columns) + 2.5, 0.9 + 0.3 * len(arms)), layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        for y, arm in enumerate(arms):
            values = cells.loc[cells["arm"] == arm, column].dropna()
            if values.empty:
                continue
            mean = interval(values)
            if np.isfinite([mean.low, mean.high]).all():
                axis.plot([mean.low, mean.high], [y, y], color=colours[arm], linewidth=2)
            axis.plot(mean.estimate, y, "o", color=colours[arm], markersize=4)
        base = f"{column.partition('@')[0]}@0"
        if base in cells and cells[base].notna().any():
            axis.axvline(cells[base].mean(), color=GREY, linestyle="--", linewidth=1)
        tidy(axis, title=title)
        axis.title.set_fontsize(8)
    axes[0].set_yticks(range(len(arms)), arms, fontsize=8)
    return figure


def pareto(
    cells: Frame,
    x: str,
    y: str,
    xlabel: str,
    ylabel: str,
    colours: Mapping[str, Any],
    base: tuple[float, float] | None = None,
) -> Figure | None:
    """Effect against side effect, with a dot for each arm (mean over its cells) and a cross for the base model; a line
    joins the arms that no other beats on both. None if no arm has both."""
    points = cells.groupby("arm", sort=False)[[x, y]].mean().dropna()
    if points.empty:
        return None
    figure = Figure(figsize=(_WIDTH, 4 + 0.12 * len(points)), layout="constrained")
    axis = figure.subplots()
    for i, (arm, point) in enumerate(points.iterrows()):
        axis.plot(point[x], point[y], "os^D"[i // 20 % 4], color=colours[str(arm)], label=str(arm))
    if base is not None:
        axis.plot(*base, "x", color=GREY, label="(base model)")
    ordered = points.sort_values([x, y], ascending=[True, False])
    front = ordered[ordered[y] > ordered[y].cummax().shift(fill_value=-np.inf)]
    axis.plot(front[x], front[y], color=GREY, linewidth=0.8, zorder=0)
    tidy(axis, xlabel=xlabel, ylabel=ylabel)
    _legend(figure, *axis.get_legend_handles_labels())
    return figure


def frontiers(
    cells: Frame, targets: Sequence[float], measures: Mapping[str, str], colours: Mapping[str, Any]
) -> Figure:
    """Means against the KL to the base on a log axis, with a panel for each measure: a line for every arm with a
    strength, a dot at its KL for every other; the base is dashed. `measures` maps a name to the label of its axis."""
    figure = Figure(figsize=(4.2 * len(measures), 4.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(measures)))
    for axis, (name, label) in zip(axes, measures.items(), strict=True):
        for arm, of_arm in cells.groupby("arm", sort=False):
            columns = [f"{name}@kl={kl:g}" for kl in targets]
            if of_arm[f"{name}@frontier"].notna().any():
                means = [of_arm[one].mean() if one in of_arm else np.nan for one in columns]
                axis.plot(targets, means, marker="o", markersize=4, color=colours[str(arm)], label=str(arm))
            else:
                point = of_arm[["kl@tuned", f"{name}@tuned"]].mean()
                axis.plot(*point, "s", color=colours[str(arm)], label=str(arm))
        if cells[f"{name}@0"].notna().any():
            axis.axhline(cells[f"{name}@0"].mean(), color=GREY, linestyle="--", linewidth=1)
        axis.set_xscale("log")
        axis.set_xticks(targets, [f"{kl:g}" for kl in targets])
        axis.minorticks_off()
        tidy(axis, xlabel="KL to the base, nats per token", ylabel=label)
    _legend(figure, *axes[0].get_legend_handles_labels())
    return figure


def _legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Put the legend below the figure, where long names are not cut off."""
    columns = 3 if max(map(len, names), default=0) < 28 else 2
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
