"""Model cards of the adapters that recipes make, with their measurements."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steertune.adapters.card import SAFETY, Card
from steertune.recipes.lab import embedded
from steertune.recipes.lab.arm import Arm
from steertune.recipes.lab.pages import settings_in_words, table_markdown
from steertune.recipes.lab.pages.measured import by_strength, comparison
from steertune.recipes.lab.rows import BASE, Record
from steertune.recipes.lab.tables import CardTable
from steertune.recipes.lab.trained_on import FILE

HASHES = (
    f" `{FILE}` has hashes of the training prompts, by which `steertune eval` refuses them as held-out rows; it has "
    "no texts."
)


def of_training(arm: Arm, record: Record) -> Card:
    """The card of a trained arm."""
    means, facts, task = record.means(), record.facts, Path(arm.data.name).name
    advice = "Layer and strength come from the arm; no measurement chose them (`steertune sweep` does that)."
    count = facts["held_out"]
    if len(means) > 2:
        rows = "held-out rows, which were not used to choose anything" if count else "neutral text"
        advice += f" On {rows}:\n\n" + table_markdown(by_strength(means))
    measured = comparison({"before": means[BASE], "after": means["1"]})
    where = f"On {count} held-out examples" if count else "No example was held out. On neutral text"
    return Card(
        title=f"{arm.name}, {task}",
        **purpose(arm.card, arm.data.name),
        data=f"{record.keys['examples']} training examples of `{task}`, seed {arm.data.seed}. {facts['split']}"
        f"{HASHES}",
        made=f"Arm `{arm.name}`: adapter {settings_in_words(arm.adapter)}, loss {settings_in_words(arm.loss)}, "
        f"{facts['steps']} steps; {facts['parameters']:,} trained parameters.",
        measured=f"{where}:\n\n{table_markdown(measured)}",
        side_effects=side_effects(means[BASE], means["1"]),
        advice=advice,
    )


def side_effects(base: Mapping[str, float], steered: Mapping[str, float]) -> str:
    """An adapter's effect on text that it should not change, from the means of the base and the steered model."""
    return (
        f"KL to the base model on neutral answers: {steered['kl']:.3f} nats per token. Perplexity of neutral answers: "
        f"{steered['perplexity']:.2f}, base model {base['perplexity']:.2f}."
    )


def purpose(table: CardTable, task: str) -> dict[str, Any]:
    """The parts of a card that are not measured: from the arm's `[card]`, or the embedded task's description."""
    safety = SAFETY if table.safety is None else f"{SAFETY}\n\n{table.safety}"
    return {"behaviour": table.behaviour or embedded.about(task), "problem": table.problem, "safety": safety}
