"""The page of reading, control and silence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steertune.adapters.card import versions
from steertune.recipes.lab.pages import Page, Section, Text, escape, table_of
from steertune.recipes.studies.reading.choice import Record, predictors, silences, verdict
from steertune.recipes.studies.reading.predictors import PREDICTORS


def page_of(records: Sequence[Record], arcs: Sequence[Record], kl: float, command: str) -> Page:
    """The page."""
    side, sentence = verdict(records)
    ranked = predictors(records)
    best = ranked[0]
    rows: list[list[Any]] = [[one.name, str(one.rho), str(one.regret)] for one in ranked]
    sections = [
        Section("", [Text(f"**{side.capitalize()}.** {sentence}"), Text(_choose(best.name, best.regret.estimate))]),
        Section(
            "Which number chooses",
            [Text(_PREDICTORS), table_of(["predictor", "rank correlation", "regret"], rows, "predictors")],
        ),
    ]
    silent = [[name, str(gap), f"{wins:.2f}"] for name, (gap, wins) in silences(records).items()]
    if silent:
        sections.append(
            Section(
                "Silence",
                [Text(_SILENCE), table_of(["direction", "more than random", "exceeds all"], silent, "silence")],
            )
        )
    for task in dict.fromkeys(one["task"] for one in records):
        sections.append(_task(task, [one for one in records if one["task"] == task], kl))
    if arcs:
        turned = [
            [one["task"], str(one["layer"]), f"{one['degrees']:g}", f"{one['control']:+.3f}", f"{one['auroc']:.3f}"]
            for one in arcs
        ]
        sections.append(
            Section(
                "From the best reader to the best controller",
                [Text(_ARC), table_of(["task", "layer", "degrees", "control", "AUROC"], turned, "arc")],
            )
        )
    sections.append(Section("How it was made", [Text(f"`{escape(command)}`, with {versions()}.")]))
    return Page("Read, control, silence", sections)


_PREDICTORS = (
    "Rank correlation of each number with control, over directions and layers within a task; and the regret: the "
    "share of the best control on test pairs that is lost when it chooses direction and layer. Means over tasks and "
    "seeds, with 95 % intervals."
)
_SILENCE = (
    "The share of an instruction's effect on the margin that is gone when the direction is projected out at a layer "
    "and all later ones, at the layer where that share is largest, minus the mean share of random directions (each at "
    "its best layer); and the share of tasks and seeds in which it exceeds all of them."
)
_ARC = (
    "At the layer of the best control: unit vectors between the direction that reads best there (0 degrees) and the "
    "one that controls best, each at the same KL."
)


def _choose(name: str, regret: float) -> str:
    return f"Of {', '.join(PREDICTORS)}, {name} chooses best: regret {regret:.2f}."


def _task(task: str, records: Sequence[Record], kl: float) -> Section:
    """The measurements of one task, the best control first."""
    ordered = sorted(records, key=lambda one: -one["control"])
    rows = [
        [
            one["direction"], str(one["layer"]), str(one["seed"]), one["read"],
            *(f"{one[name]:.3f}" for name in PREDICTORS),
            f"{one['control']:+.3f}{'' if one['reached'] else ' *'}",
            "-" if one["silence"] is None else f"{one['silence']:+.2f}",
        ]
        for one in ordered
    ]  # fmt: skip
    what = (
        f"TF-IDF of the text reads the same held-out answers with an area of {records[0]['text_auroc']:.3f}. Control "
        f"is at a KL of {kl:g}; * does not reach it."
    )
    header = ["direction", "layer", "seed", "read", *PREDICTORS, "control", "silence"]
    return Section(escape(task), [Text(what), table_of(header, rows, f"triad-{task}")])
