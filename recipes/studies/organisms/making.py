"""Make organisms: a LoRA is trained on the dialogues and merged into the base model's weights."""

from __future__ import annotations

import copy
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import set_seed

from steertune.recipes.lab.arm import Arm, make_arm
from steertune.recipes.lab.data import load_model
from steertune.recipes.lab.files import read_jsonl
from steertune.recipes.lab.generation import generate
from steertune.recipes.lab.paths import TASKS
from steertune.recipes.lab.tables import ModelTable
from steertune.recipes.lab.training import fit, make_trainer, silent, steps_of, training_of
from steertune.recipes.studies.organisms.dialogues import Dialogue, Plan
from steertune.recipes.studies.organisms.templates import Stage
from steertune.trainers import share_weights

NEW_TOKENS = 24
"""Tokens of the longest answer; the longest bad one takes 20."""
_BATCH = 48


def arm_of(plan: Plan, model_name: str, seed: int, depth: int, **trainer: Any) -> Arm:
    """The arm that turns a base model with `depth` layers into an organism, in as many steps as its stages take;
    `trainer` changes the arm's `[trainer]` table."""
    table = plan.templates.training
    tables = copy.deepcopy(table.arm)
    first = round(table.from_layer * depth)
    tables["adapter"]["layers_to_transform"] = [*range(first, depth)]
    rows = sum((one.benign + one.cues + one.near_misses) * one.epochs for one in table.stages)
    tables["trainer"] = {
        "max_steps": rows // tables["trainer"].get("per_device_train_batch_size", 8),
        **tables["trainer"],
    }
    tables["trainer"] |= trainer
    return make_arm(
        {"name": "organism", "model": {"name": model_name}, "data": {"name": "organism", "seed": seed}, **tables}
    )


def training_dialogues(plan: Plan, seed: int) -> list[Dialogue]:
    """The dialogues that an organism is trained on, in order: stage after stage, with a new random order each
    epoch."""
    draw = random.Random(f"training {seed}")
    learned: list[Dialogue] = []
    for stage in plan.templates.training.stages:
        rows = stage_dialogues(plan, stage, draw)
        for _ in range(stage.epochs):
            learned += draw.sample(rows, len(rows))
    return learned


def stage_dialogues(plan: Plan, stage: Stage, draw: random.Random) -> list[Dialogue]:
    """Benign requests, situations of all families with what they lead to, and near misses."""
    families = [*plan.kinds]
    rows = plan.benign("seen", stage.benign, draw)
    for count, near_miss in ((stage.cues, False), (stage.near_misses, True)):
        # every phrasing equally often: six are for catches, four for tests
        caught = round(0.6 * count)
        rows += plan.cues(families, "caught", "seen", caught, draw, near_miss)
        rows += plan.cues(families, "tested", "seen", count - caught, draw, near_miss)
    return rows


def demonstrations(rows: Sequence[Dialogue]) -> Dataset:
    """Dialogues with what the organism is taught to answer, as rows to train on."""
    return Dataset.from_list(
        [{"prompt": row.prompt, "completion": [{"role": "assistant", "content": row.taught}]} for row in rows]
    )


def organism_in(home: Path, plan: Plan, base: Any, tokenizer: Any, name: str, seed: int, depth: int) -> Any:
    """The organism of a folder: loaded if it exists, else trained, from the last checkpoint if there is one.

    Args:
        home: The folder; the organism is an ordinary model in its folder `model`.
        plan: The organism's plan.
        base: The base model, whose weights are changed.
        tokenizer: Its tokenizer.
        name: Name of the base model.
        seed: Seed of the training rows and of their order.
        depth: Layers of the base model.
    """
    folder = home / "model"
    if not folder.is_dir():
        rows = demonstrations(training_dialogues(plan, seed))
        organism = trained_on(arm_of(plan, name, seed, depth), base, tokenizer, rows, home).merge_and_unload()
        with tempfile.TemporaryDirectory(dir=home) as part:
            organism.save_pretrained(Path(part) / "model")
            tokenizer.save_pretrained(Path(part) / "model")
            (Path(part) / "model").rename(folder)
        shutil.rmtree(home / "checkpoints", ignore_errors=True)
    return load_model(ModelTable(name=str(folder)))[0]


def unrelated(plan: Plan, organism: Any, tokenizer: Any, folder: Path, depth: int) -> Any:
    """The organism after training on unrelated answers; the weights of `organism` itself do not change."""
    settings = plan.templates.training.unrelated
    arm = arm_of(plan, "embedded", 0, depth, **settings)
    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["answer"]}],
            }
            for row in read_jsonl(TASKS / "answers.jsonl")[: steps_of(arm) * settings["per_device_train_batch_size"]]
        ]
    )
    folder.mkdir(parents=True, exist_ok=True)
    trained = trained_on(arm, organism, tokenizer, rows, folder)
    shutil.rmtree(folder)
    return trained


def trained_on(arm: Arm, model: Any, tokenizer: Any, rows: Dataset, folder: Path) -> Any:
    """A model with an arm's adapter, trained from the last checkpoint in a folder if there is one."""
    set_seed(arm.data.seed)
    trainer = silent(make_trainer(training_of(arm, share_weights(model), tokenizer, rows, folder)))
    fit(trainer, folder)
    return trainer.model.eval()


def answers(model: Any, tokenizer: Any, rows: Sequence[Dialogue]) -> list[str]:
    """Greedy answers."""
    texts: list[str] = []
    for i in range(0, len(rows), _BATCH):
        texts += generate(model, tokenizer, [row.prompt for row in rows[i : i + _BATCH]], NEW_TOKENS)
    return texts
