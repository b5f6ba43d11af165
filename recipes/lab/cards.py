"""Model cards of the adapters that recipes make, with what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steertune.adapters.card import SAFETY, Card
from steertune.recipes.lab import embedded
from steertune.recipes.lab.arm import Arm, CardTable
from steertune.recipes.lab.page import preference


def of_training(arm: Arm, result: Mapping[str, Any]) -> Card:
    """The card of a trained arm.

    Args:
        arm: The arm.
        result: The content of its `result.json`.
    """
    effects, cost, task = result["side_effects"], result["cost"], Path(arm.data.name).name
    measured = ["| | before | after |", "|---|---|---|", *preference(result)] if result["strengths"] else []
    rows = [f"| {r['strength']:g} | {r['pair_accuracy']:.3f} | {r['margin']:.2f} |" for r in result["strengths"]]
    strengths = ["| strength | pair accuracy | margin, nats |", "|---|---|---|", *rows] if rows else []
    advice = "Layer and strength come from the arm; no measurement chose them (`steertune sweep` does that)."
    if strengths:
        advice += " On held-out rows, which were not used to choose anything:\n\n" + "\n".join(strengths)
    return Card(
        title=f"{arm.name}, {task}",
        **purpose(arm.card, arm.data.name),
        data=f"{arm.data.train} training examples of `{task}`, seed {arm.data.seed}.",
        made=f"Arm `{arm.name}`: adapter `{arm.adapter}`, loss `{arm.loss}`, {cost['steps']} steps; "
        f"{cost['trainable_parameters']:,} trained parameters.",
        measured="\n".join(measured) or None,
        side_effects=_side_effects(effects["kl"], effects["perplexity"], effects["base_perplexity"]),
        advice=advice,
    )


def of_sweep(result: Mapping[str, Any], lines: list[str]) -> Card:
    """The card of the setting that a sweep recommended.

    Args:
        result: The content of its `result.json`.
        lines: The table of its results on test rows.
    """
    settings, test, base = result["settings"], result["test"], result["base"]["test"]
    arm, task = settings["arm"], Path(settings["task"]).name
    name = settings["direction"] if arm is None else arm["name"]
    what = f"the {'direction' if arm is None else 'arm'} `{name}`"
    where = result["recommended"]
    effects = _side_effects(test["kl"], test["perplexity"], base["perplexity"])
    if "repetition" in test:
        effects += f" Repeated word triples: {test['repetition']:.0%}, base model {base['repetition']:.0%}."
    return Card(
        title=f"{name}, {task}",
        **purpose(CardTable(**(arm or {}).get("card", {})), settings["task"]),
        data=f"{settings['train']} training pairs of `{task}`, seed {settings['seed']}.",
        made=f"A sweep of {what} over layers {settings['layers']} and strengths {settings['strengths']}.",
        measured="\n".join(lines),
        side_effects=effects,
        advice=f"Strength 1 of this adapter is strength {where['strength']:g} of the sweep, baked in: use the adapter "
        f"as it is. {result['reason']}",
    )


def _side_effects(kl: float, perplexity: float, base: float) -> str:
    return (
        f"KL to the base model on neutral answers: {kl:.3f} nats per token. Perplexity of neutral answers: "
        f"{perplexity:.2f}, base model {base:.2f}."
    )


def purpose(table: CardTable, task: str) -> dict[str, Any]:
    """The parts of a card that no measurement gives: from the arm's `[card]`, or the embedded task's description."""
    safety = SAFETY if table.safety is None else f"{SAFETY}\n\n{table.safety}"
    return {"behaviour": table.behaviour or embedded.about(task), "problem": table.problem, "safety": safety}
