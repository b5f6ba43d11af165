"""A measure example by example: the values of every cell on every test row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from steertune.recipes.ablation.statistics import Frame


def examples_of(column: str) -> str:
    """The column with the values behind a column of means."""
    return f"{column} by example"


def rows_of(cells: Frame, column: str) -> Frame:
    """For every cell, an array over the test rows (or answers) whose mean is the measure; None without the measure."""
    values = cells.get(examples_of(column), pd.Series(None, index=cells.index, dtype=object))
    rows = [
        None if pd.isna(mean) else values_of if isinstance(values_of, np.ndarray) else np.array([float(mean)])
        for mean, values_of in zip(cells[column], values, strict=True)
    ]
    return pd.Series(rows, index=cells.index, dtype=object)


def with_base(cells: Frame, name: str) -> Frame:
    """Add the base model as an arm called `name`, from the observations at strength 0 that every cell holds."""
    base = cells.dropna(subset=["accuracy@0"])  # a failed cell does not hold them
    base = base.drop_duplicates(["task", "seed", "examples"]).assign(arm=name)
    for at_base in [column for column in cells if str(column).partition("@")[2].partition(" ")[0] == "0"]:
        measure, _, rest = str(at_base).partition("@0")
        for strength in ("tuned", "matched", "frontier"):
            base[f"{measure}@{strength}{rest}"] = base[at_base]
    return pd.concat([cells, base], ignore_index=True)


def over_examples(cells: Frame, column: str, levels: Sequence[str]) -> Frame:
    """Means over the numbers of examples, by these columns (task and seed among them), as arrays over the test rows.
    Only groups that have every number count, since scores rise with the number of examples."""
    index = pd.MultiIndex.from_frame(cells[[*levels, "examples"]])
    values = rows_of(cells, column).set_axis(index).unstack("examples").dropna()
    if values.empty:
        return pd.Series(index=pd.MultiIndex.from_arrays([[] for _ in levels], names=levels), dtype=object)
    return mean_rows(values.stack(future_stack=True), levels)


def mean_rows(values: Frame, levels: Sequence[str]) -> Frame:
    """Mean of arrays within groups of the index; NaN for a row that could not be judged in one of them."""
    means = {key: np.mean(np.stack([*group]), axis=0) for key, group in values.groupby(level=list(levels), sort=True)}
    return pd.Series([*means.values()], index=pd.MultiIndex.from_tuples(means, names=levels), dtype=object)
