"""The sections of a report. Each file of this folder is one section, named by the file:

    @section(place=50)
    def cost(findings: Findings) -> Section | None:
        \"\"\"What every arm costs.\"\"\"

`place` is its position on the page. A new file is a new section of every report; one without content returns
None.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import pandas as pd

from steertune.adapters.registry import file_names
from steertune.recipes.ablation.findings import Findings
from steertune.recipes.ablation.statistics.paired import Difference, too_few
from steertune.recipes.lab.pages import Block, Section, Table, Text, table_of


@dataclass(frozen=True)
class SectionFile:
    """One section.

    Attributes:
        name: Its file.
        place: Its position: sections are sorted by it.
        make: The findings -> the section; None for no section.
    """

    name: str
    place: int
    make: Callable[[Findings], Section | None]


def section(place: int) -> Callable[[Callable[[Findings], Section | None]], SectionFile]:
    """Turn a function into a section."""
    return lambda function: SectionFile(function.__name__, place, function)


@cache
def files() -> tuple[SectionFile, ...]:
    """The files of this folder, in their order on the page."""
    made = [getattr(importlib.import_module(f"{__name__}.{name}"), name) for name in file_names(*__path__)]
    return tuple(sorted(made, key=lambda one: one.place))


def sections(findings: Findings) -> list[Section]:
    """The sections of a report."""
    return [made for file in files() if (made := file.make(findings)) is not None]


# -- what several sections share --------------------------------------------------

OTHER_TASKS, OTHER_ROWS, ROWS = "95 %, other tasks too", "95 %, other test rows too", "95 %, these test rows"
ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}
"""Which direction of a measure is better -> the arrow after its name."""
COMPARED = [OTHER_TASKS, OTHER_ROWS, ROWS, "p (Holm)", "pairs"]


def numbers(difference: Difference) -> list[str]:
    """A difference as cells of a table: the estimate, then those of `COMPARED`."""
    ends = [difference.tasks.ends, difference.crossed.ends, difference.interval.ends]
    return [f"{difference.estimate:+.3f}", *ends, p_text(difference.p), str(difference.interval.pairs)]


def emphasised(sentence: str, findings: Findings) -> str:
    """A sentence with labels of several words in italics."""
    labels = sorted((label for label in findings.labels.values() if ", " in label), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, labels)), r"*\g<0>*", sentence) if labels else sentence


def p_text(value: float) -> str:
    """A p value as text."""
    return f"{value:.3g}" if value >= 1e-4 else "< 0.0001"


def reach(differences: Sequence[Difference]) -> list[Block]:
    """A sentence if the pairs are too few for anything in a table to be clear."""
    sentence = too_few(differences)
    return [Text(sentence)] if sentence else []


def means_table(means: pd.DataFrame, headers: Sequence[str], formats: Sequence[str], name: str) -> Table:
    """A table with a row for every arm; missing values are empty."""
    rows = [
        [str(arm), *("" if pd.isna(v) else form.format(v) for v, form in zip(row, formats, strict=True))]
        for arm, row in zip(means.index, means.to_numpy(dtype=float), strict=True)
    ]
    return table_of(["arm", *headers], rows, name)
