"""Helpers for all figures: plain axes, and points with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from steertune.recipes.lab.intervals import Interval

GREY = "#777777"


def tidy(axis: Axes, **labels: str) -> None:
    """Set the labels of an axis, and simplify its frame and grid."""
    axis.set(**labels)  # pyright: ignore[reportArgumentType]
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)


def error_bars(axis: Axes, x: ArrayLike, values: Sequence[Interval], **style: Any) -> None:
    """Draw estimates with their intervals, except for unknown ends."""
    y = np.array([value.estimate for value in values])
    ends = np.array([[value.low, value.high] for value in values])
    ends = np.where(np.isfinite(ends), ends, y[:, None])
    axis.errorbar(x, y, yerr=np.abs(ends - y[:, None]).T, markersize=4, **style)  # (2, points): below and above
