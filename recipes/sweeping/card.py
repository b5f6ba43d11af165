"""The model card of the setting that a sweep recommended."""

from __future__ import annotations

from pathlib import Path

from steertune.adapters.card import Card
from steertune.recipes.lab.cards import HASHES, purpose, side_effects
from steertune.recipes.lab.rows import BASE, label
from steertune.recipes.lab.tables import CardTable
from steertune.recipes.sweeping.page import Sweep


def card(result: Sweep, measured: str) -> Card:
    """The card of the setting that a sweep recommended. `measured` is the table of its results on test rows."""
    table, tested = result.table, result.tested
    arm, task, means = table.arm, Path(table.task).name, tested.record.means()
    name = table.direction if arm is None else arm.name
    base, steered = means[BASE], means[label(tested.strength)]
    effects = side_effects(base, steered)
    if "neutral_repetition" in steered:
        effects += f" Repeated word triples: {steered['neutral_repetition']:.0%}"
        effects += f", of the base model {base['neutral_repetition']:.0%}." if "neutral_repetition" in base else "."
    return Card(
        title=f"{name}, {task}",
        **purpose(CardTable() if arm is None else arm.card, table.task),
        data=f"{table.train} training pairs of `{task}`, seed {table.seed}. {result.split}{HASHES}",
        made=f"A sweep of {table.what} over layers {table.layers} and strengths {table.strengths}.",
        measured=measured,
        side_effects=effects,
        advice=f"Strength 1 of this adapter is strength {tested.strength:g} of the sweep, baked in: use it as it is. "
        f"{result.choice.reason}",
    )
