"""The model card of the setting that a sweep recommended."""

from __future__ import annotations

from pathlib import Path

from steertune.adapters.card import Card
from steertune.recipes.lab.cards import purpose, side_effects
from steertune.recipes.lab.rows import BASE, Record, label
from steertune.recipes.lab.tables import CardTable
from steertune.recipes.sweeping.settings import SweepTable


def card(table: SweepTable, test: Record, strength: float, reason: str, lines: list[str]) -> Card:
    """The card of the setting that a sweep recommended.

    Args:
        table: What was swept.
        test: What the setting did on test rows.
        strength: The setting's.
        reason: Why it is recommended.
        lines: The table of what it did on test rows.
    """
    arm, task, means = table.arm, Path(table.task).name, test.means()
    name = table.direction if arm is None else arm.name
    what = f"the {'direction' if arm is None else 'arm'} `{name}`"
    base, steered = means[BASE], means[label(strength)]
    effects = side_effects(base, steered)
    if "neutral_repetition" in steered:
        effects += (
            f" Repeated word triples: {steered['neutral_repetition']:.0%}, of the base model "
            f"{base['neutral_repetition']:.0%}."
        )
    return Card(
        title=f"{name}, {task}",
        **purpose(CardTable() if arm is None else arm.card, table.task),
        data=f"{table.train} training pairs of `{task}`, seed {table.seed}.",
        made=f"A sweep of {what} over layers {table.layers} and strengths {table.strengths}.",
        measured="\n".join(lines),
        side_effects=effects,
        advice=f"Strength 1 of this adapter is strength {strength:g} of the sweep, baked in: use it as it is. {reason}",
    )
