"""Model cards of what recipes make: what was measured goes into the card of the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steertune.adapters.card import SAFETY, Card
from steertune.recipes.lab import embedded
from steertune.recipes.lab.arm import Arm
from steertune.recipes.lab.page import by_strength, comparison
from steertune.recipes.lab.rows import BASE, Record
from steertune.recipes.lab.tables import CardTable


def of_training(arm: Arm, record: Record) -> Card:
    """The card of an arm that was trained.

    Args:
        arm: The arm.
        record: The base model at strength 0, the trained one at the others.
    """
    means, facts, task = record.means(), record.facts, Path(arm.data.name).name
    advice = "Layer and strength are the arm's, not chosen by measurement (`steertune sweep` does that)."
    if len(means) > 2:
        advice += " On the held-out rows, which chose nothing:\n\n" + "\n".join(by_strength(means))
    return Card(
        title=f"{arm.name}, {task}",
        **purpose(arm.card, arm.data.name),
        data=f"{arm.data.train} training examples of `{task}`, seed {arm.data.seed}.",
        made=f"Arm `{arm.name}`: adapter `{arm.adapter}`, loss `{arm.loss}`, {facts['steps']} steps; "
        f"{facts['parameters']:,} trained parameters.",
        measured="\n".join(comparison({"before": means[BASE], "after": means["1"]})),
        side_effects=side_effects(means[BASE], means["1"]),
        advice=advice,
    )


def side_effects(base: Mapping[str, float], steered: Mapping[str, float]) -> str:
    """What an adapter does to text it should leave alone, from the means of the base model and of the steered one."""
    return (
        f"KL to the base model on neutral answers: {steered['kl']:.3f} nats a token. Perplexity of neutral answers: "
        f"{steered['perplexity']:.2f}, of the base model {base['perplexity']:.2f}."
    )


def purpose(table: CardTable, task: str) -> dict[str, Any]:
    """What a card says that was not measured: what the arm's `[card]` says, or the embedded task's own description."""
    safety = SAFETY if table.safety is None else f"{SAFETY}\n\n{table.safety}"
    return {"behaviour": table.behaviour or embedded.about(task), "problem": table.problem, "safety": safety}
