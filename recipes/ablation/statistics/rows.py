"""A measure row by row: what every cell scored on every test row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from steertune.recipes.ablation.statistics import Frame


def rows_of(cells: Frame, measure: str) -> Frame:
    """Per cell an array over the test rows (or answers) whose mean is the measure; None for a cell that has none.

    A measure whose rows were not kept is an array of one.
    """
    prefix = "matched_" if measure.startswith("matched_") else ""
    margins = cells.get(f"{prefix}margins")
    kind = measure.removeprefix("matched_")
    if kind == "accuracy" and margins is not None:
        found = [_array(m, lambda values: (np.sign(values) + 1) / 2) for m in margins]
    elif kind == "margin_gain" and margins is not None and "base_margins" in cells:
        bases = [_array(b) for b in cells["base_margins"]]
        gains = zip(map(_array, margins), bases, strict=True)
        found = [None if m is None or b is None else m - b for m, b in gains]
    elif kind == "behaviour" and f"{prefix}behaviours" in cells:
        found = [_array(b) for b in cells[f"{prefix}behaviours"]]
    else:
        found = [None if pd.isna(value) else np.array([float(value)]) for value in cells[measure]]
    # a cell whose measure is missing (unmatched, failed) has no rows either
    kept = [None if pd.isna(value) else rows for value, rows in zip(cells[measure], found, strict=True)]
    return pd.Series(kept, index=cells.index, dtype=object)


def with_base(cells: Frame, name: str) -> Frame:
    """The cells, and the base model as one more arm called `name`, from what every cell keeps of it."""
    known = cells.dropna(subset=["base_accuracy"])  # a failed cell knows nothing of it
    base = known.drop_duplicates(["task", "seed", "examples"]).assign(arm=name)
    for prefix in ("", "matched_"):
        there = [kind for kind in ("accuracy", "margins", "behaviour", "behaviours") if f"base_{kind}" in base]
        base = base.assign(**{prefix + kind: base[f"base_{kind}"] for kind in there}, **{f"{prefix}margin_gain": 0.0})
    return pd.concat([cells, base], ignore_index=True)


def over_examples(cells: Frame, measure: str, levels: Sequence[str]) -> Frame:
    """Means over the numbers of examples, by these columns (task and seed among them), as arrays over the test rows;
    only of what has every number, since training sets are nested and scores rise with them."""
    index = pd.MultiIndex.from_frame(cells[[*levels, "examples"]])
    values = rows_of(cells, measure).set_axis(index).unstack("examples").dropna()
    if values.empty:
        return pd.Series(index=pd.MultiIndex.from_arrays([[] for _ in levels], names=levels), dtype=object)
    return mean_rows(values.stack(future_stack=True), levels)


def mean_rows(values: Frame, levels: Sequence[str]) -> Frame:
    """Mean of arrays within groups of the index; a row that could not be judged in one of them has none (NaN)."""
    means = {key: np.mean(np.stack([*group]), axis=0) for key, group in values.groupby(level=list(levels), sort=True)}
    return pd.Series([*means.values()], index=pd.MultiIndex.from_tuples(means, names=levels), dtype=object)


def _array(values: Any, change: Callable[[Any], Any] = lambda values: values) -> Any:
    return change(np.array(values, dtype=float)) if isinstance(values, list | np.ndarray) else None
