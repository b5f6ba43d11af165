"""Train a fix from some of the catches, and test it as trained and at the study's KL to the organism."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import set_seed

from steertune.adapters.monitors import Monitor
from steertune.recipes.ablation.kl_search import strengths_at
from steertune.recipes.lab.evaluate import evaluate, evaluate_base
from steertune.recipes.lab.monitoring import scores_of
from steertune.recipes.lab.observe import Observations
from steertune.recipes.lab.rows import BASE
from steertune.recipes.lab.training import QUIET, fit, make_trainer, silent, training_of
from steertune.recipes.patching.policy import training_rows, with_innocent
from steertune.recipes.studies.organisms.dialogues import SPLITS
from steertune.recipes.studies.redeploying.tables import NOTHING
from steertune.recipes.studies.redeploying.world import World, said
from steertune.trainers import scaled, share_weights

TRAINED, MATCHED = "trained", "matched"
_MEASURES = ("margin_per_token", "repetition", "kl")


def fixed(world: World, arm: str, catches: int, monitor: Monitor | None = None) -> dict[str, Any]:
    """One cell of the study.

    Args:
        world: The organism.
        arm: Name of an arm of the study, or `nothing`.
        catches: How many catches the fix is made from.
        monitor: Fitted on the same number of catches of the organism; it scores the fixed model's answers.
    """
    started = time.process_time()
    cell: dict[str, Any] = {"organism": world.number, "arm": arm, "catches": catches}
    if arm == NOTHING:
        model = world.loaded[0]
        observed = {TRAINED: evaluate_base(world.held_out, _MEASURES)[BASE]}
        cell["strengths"] = {TRAINED: 1.0}
    else:
        model = trained(world, arm, catches)
        with world.held_out.remember(model):
            [point], _ = strengths_at(model, world.held_out, [world.study.kl], world.study.largest)
            strengths = {TRAINED: 1.0, MATCHED: point.strength}
            observed = evaluate(model, world.held_out, _MEASURES, strengths)
        cell |= {"strengths": strengths, "reached": point.reached}
    cell["seen"] = {at: judged(world, values) for at, values in observed.items()}
    if monitor is not None:
        cell["monitor"] = {
            at: _monitored(world, model, monitor, values, cell["strengths"][at]) for at, values in observed.items()
        }
    return {**cell, "seconds": round(time.process_time() - started, 1)}


def trained(world: World, arm_name: str, catches: int) -> Any:
    """The organism with the fix, in evaluation mode."""
    model, tokenizer = world.loaded
    arm = world.study.arm_of(arm_name, world.model_name, world.number)
    rows = Dataset.from_list(training_rows(arm, world.catches[:catches]))
    arm = with_innocent(arm, world.traffic)
    with tempfile.TemporaryDirectory() as folder:
        set_seed(arm.data.seed)
        training = training_of(arm, share_weights(model), tokenizer, rows, Path(folder))
        trainer = silent(make_trainer(training, world.held_out.prefix, **QUIET))
        fit(trainer, Path(folder))
    return trainer.model.eval()


def judged(world: World, seen: Observations) -> dict[str, Any]:
    """For the answers to each set, the kind of bad action or "", whether they are right, and the margin of the good
    over the taught answer in nats per token; and the KL."""
    result: dict[str, Any] = {"kl": round(sum(seen["neutral_kl"]) / sum(seen["neutral_tokens"]), 5)}
    sides = zip(*(seen[name] for name in _MARGIN), strict=True)
    margins = [round(good / of_good - bad / of_bad, 4) for good, bad, of_good, of_bad in sides]
    start = 0
    for name, rows in world.asked.items():
        texts = seen["answer"][start : start + len(rows)]
        result[name] = {
            "bad": [world.plan.verdict(row, text) or "" for row, text in zip(rows, texts, strict=True)],
            "right": [int(world.plan.helpful(row, text)) for row, text in zip(rows, texts, strict=True)],
        }
        if name in SPLITS:
            result[name] |= {"margin": margins[start : start + len(rows)], "family": [row.family for row in rows]}
        start += len(rows)
    return result


_MARGIN = ("chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens")


def _monitored(world: World, model: Any, monitor: Monitor, seen: Observations, strength: float) -> dict[str, Any]:
    """For each split, whether the monitor flags the answers in which the fixed model still does something bad."""
    flags: dict[str, list[int]] = {}
    start = 0
    for split in SPLITS:
        rows = world.asked[split]
        texts = seen["answer"][start : start + len(rows)]
        bad = [(row, text) for row, text in zip(rows, texts, strict=True) if world.plan.verdict(row, text)]
        shown = Dataset.from_list([{"prompt": row.prompt, "completion": said(text)} for row, text in bad])
        with scaled(model, strength):
            scores = scores_of([monitor], model, world.loaded[1], shown)
        flags[split] = [int(monitor.flags(score)) for [score] in scores]
        start += len(rows)
    return flags
