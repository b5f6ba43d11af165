"""The figures of a sweep. Each is a separate `Figure`, without a display or global state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from steertune.recipes.lab.pages.drawing import GREY, tidy
from steertune.recipes.sweeping.choose import Choice, Reliability, Setting

_COLUMNS = 3
Value = Callable[[Setting], float]


def heat_maps(settings: Sequence[Setting], panels: dict[str, tuple[Value, str]], choice: Choice) -> Figure:
    """Layers x strengths, with a panel for each measure and site; the recommended setting is framed. `panels` maps a
    title to the measure and its colours."""
    sites = list(dict.fromkeys(setting.site for setting in settings))
    layers = sorted({setting.layer for setting in settings})
    strengths = sorted({setting.strength for setting in settings})
    rows = -(-len(panels) // _COLUMNS)
    size = (0.5 + 0.5 * len(strengths)) * _COLUMNS, (1.0 + 0.3 * len(layers)) * rows * len(sites)
    figure = Figure(figsize=(max(7.0, size[0]), size[1]), layout="constrained")
    axes = figure.subplots(rows * len(sites), _COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for block, site in enumerate(sites):
        for place, (title, (value, colours)) in enumerate(panels.items()):
            axis = axes[block * rows + place // _COLUMNS, place % _COLUMNS]
            grid = np.full((len(layers), len(strengths)), np.nan)
            for setting in (setting for setting in settings if setting.site == site):
                grid[_where(setting, layers, strengths)] = value(setting)
            if np.isnan(grid).all():
                continue  # such as the repetition of answers that are too short
            axis.set_visible(True)
            _heat(axis, grid, colours)
            axis.set_xticks(range(len(strengths)), [f"{s:g}" for s in strengths], fontsize=8)
            axis.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=8)
            axis.set_title(title if len(sites) == 1 else f"{title}, {site}", fontsize=9)
            axis.set_xlabel("strength", fontsize=8)
            axis.set_ylabel("layer", fontsize=8)
            if choice.setting is not None and choice.setting.site == site:
                y, x = _where(choice.setting, layers, strengths)
                axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2.5))
    return figure


def _where(setting: Setting, layers: list[int], strengths: list[float]) -> tuple[int, int]:
    return layers.index(setting.layer), strengths.index(setting.strength)


def _heat(axis: Axes, grid: NDArray[np.float64], colours: str) -> None:
    """Draw cells with their numbers, upper layers on top."""
    norm, palette = Normalize(np.nanmin(grid), np.nanmax(grid)), colormaps[colours]
    axis.imshow(grid, origin="lower", aspect="auto", cmap=palette, norm=norm)
    for (y, x), value in np.ndenumerate(grid):
        if np.isfinite(value):
            red, green, blue, _ = palette(norm(value))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            text = f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
            axis.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")


def pareto(settings: Sequence[Setting], value: Value, base: float, limit: float, choice: Choice, label: str) -> Figure:
    """Behaviour against KL, with a dot for each setting, coloured by layer; settings that no other beats on both are
    joined. The recommended one is circled; `base` is the base model's value and `limit` the largest allowed KL."""
    points = [(max(c.value("kl"), 1e-6), value(c), c) for c in settings]
    points = [point for point in points if np.isfinite(point[:2]).all()]
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = figure.subplots()
    layers = sorted({c.layer for c in settings})
    norm, palette = Normalize(layers[0], max(layers[-1], layers[0] + 1)), colormaps["viridis"]
    markers = dict(zip(dict.fromkeys(c.site for c in settings), "osD", strict=False))
    front = _front(points, base)
    axis.plot([x for x, _, _ in front], [y for _, y, _ in front], color=GREY, linewidth=0.9, zorder=1)
    for x, y, c in points:
        axis.plot(x, y, markers[c.site], color=palette(norm(c.layer)), markersize=5.5, zorder=2)
    for x, y, c in front:
        label_at = f"{c.layer}×{c.strength:g}"
        axis.annotate(label_at, (x, y), (3, 5), textcoords="offset points", fontsize=7)
    if choice.setting is not None:
        ring = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": "red", "markeredgewidth": 1.8}
        axis.plot(max(choice.setting.value("kl"), 1e-6), value(choice.setting), "o", label="recommended", **ring)
    axis.axhline(base, color=GREY, linestyle="--", linewidth=0.9, label="base model")
    axis.axvline(limit, color="red", linestyle=":", linewidth=0.9, label="limit of the KL")
    axis.set_xscale("log")
    tidy(axis, xlabel="KL to the base on neutral text, nats a token (layer×strength on the front)", ylabel=label)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    figure.colorbar(ScalarMappable(norm, palette), ax=axis, label="layer", ticks=layers)
    return figure


def _front(points: Sequence[tuple[float, float, Setting]], base: float) -> list[tuple[float, float, Setting]]:
    """The Pareto front, base model included: points that no other beats in both KL and behaviour."""
    front, best = [], base
    for x, y, c in sorted(points, key=lambda p: (p[0], -p[1])):
        if y > best:
            front.append((x, y, c))
            best = y
    return front


def slopes(parts: dict[str, Reliability]) -> Figure:
    """Per-example slopes, sorted, with a panel for each part of the rows; red ones go the wrong way."""
    figure = Figure(figsize=(3.6 * len(parts), 2.8), layout="constrained")
    axes = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
    for axis, (part, one) in zip(axes, parts.items(), strict=True):
        values = sorted(one.slopes)
        axis.bar(range(len(values)), values, width=0.85, color=["C3" if v < 0 else "C0" for v in values])
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=f"{part}: {one.wrong} of {len(values)} the wrong way", xlabel="example, sorted")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("d margin / d strength (nats)")
    return figure
