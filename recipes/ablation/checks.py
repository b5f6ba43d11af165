"""Checks of a grid against its card, its budgets and its own tables."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from peft import LoraConfig
from trl import DPOConfig

from steertune.adapters import SteeringVectorConfig
from steertune.recipes.ablation.budget import draw
from steertune.recipes.ablation.levels import arm_name
from steertune.recipes.ablation.tables import Card, Claim, GridArm, GridTables, TaskTable
from steertune.recipes.lab import measures
from steertune.recipes.lab.arm import Arm
from steertune.recipes.lab.files import ArmError, nearest
from steertune.recipes.lab.ingredients.prompt import Prompt
from steertune.recipes.lab.ingredients.teachers import Teachers
from steertune.recipes.lab.ingredients.views import Views
from steertune.recipes.lab.tables import ModelTable
from steertune.trainers.views.demonstrations import Demonstrations
from steertune.trainers.views.instruction import Instruction


def check_budgets(card: Card, arms: list[GridArm]) -> None:
    different = [arm.name for arm in arms if arm.budget != arms[0].budget]
    if different and not card.unequal_budgets:
        raise ArmError(
            f"Arms {different} have a different tuning budget than {arms[0].name!r}, so a difference could come from "
            "the tuning. Give all arms the same [budget], or say why not in card.unequal_budgets."
        )
    trained = [arm for arm in arms if arm.arm.trainer.get("max_steps") != 0]
    trials = {arm.name: len(draw(arm.budget, 0, has_one_layer(arm.arm))) for arm in trained}
    if len(set(trials.values())) > 1 and not card.unequal_budgets:
        raise ArmError(
            f"Arms have different numbers of trials, because some have no layer to choose: {trials}. List two or more "
            "multiples in budget.learning_rate, so that those arms try more rates in that range, or say why not in "
            "card.unequal_budgets."
        )
    batches = {arm.name: batch_size(arm.arm) for arm in trained}
    if len(set(batches.values())) > 1 and not card.unequal_budgets:
        raise ArmError(
            f"Arms read different numbers of examples per step, so equal steps are not the same budget: {batches}. "
            "Set per_device_train_batch_size in the grid's [trainer], or say why not in card.unequal_budgets."
        )


def check_reading(examples: list[int], arms: list[GridArm]) -> None:
    """Refuse numbers of examples that training would not read completely."""
    for arm in arms:
        reads = batch_size(arm.arm) * max(arm.budget.steps)
        if arm.arm.trainer.get("max_steps") != 0 and not arm.arm.get(Prompt) and max(examples) > reads:
            raise ArmError(
                f"examples={examples}, but arm {arm.name!r} reads {reads} in {max(arm.budget.steps)} steps of "
                f"{batch_size(arm.arm)} and would never see the rest. Set budget.steps to "
                f"{-(-max(examples) // batch_size(arm.arm))} or more, or ask for at most {reads} examples."
            )


def batch_size(arm: Arm) -> int:
    """Examples that an arm reads in one step of one process."""
    default = DPOConfig.per_device_train_batch_size
    return int(arm.trainer.get("per_device_train_batch_size", default)) * int(
        arm.trainer.get("gradient_accumulation_steps", 1)
    )


def has_strength(arm: Arm) -> bool:
    """Whether an arm's adapter has a strength (see `scalable`); vectors that stay zero do nothing at any strength."""
    config = arm.peft_config()
    if isinstance(config, SteeringVectorConfig) and config.init == "zeros" and arm.trainer.get("max_steps") == 0:
        return False
    return isinstance(config, SteeringVectorConfig | LoraConfig)


def has_one_layer(arm: Arm) -> bool:
    """Whether an arm writes into one layer, which a budget can choose."""
    config = arm.peft_config()
    if isinstance(config, SteeringVectorConfig):
        layers: Any = config.layers
    else:
        layers = getattr(config, "layers_to_transform", None)
    return len(layers) == 1 if isinstance(layers, list | tuple) else isinstance(layers, int | float)


def check_arms(tables: GridTables, arms: list[GridArm]) -> None:
    """Refuse arms that contradict the grid's own tables."""
    model = _model(ModelTable(**tables.model))
    for arm in arms:
        if _model(arm.arm.model) != model:
            raise ArmError(
                f"Arm {arm.name!r} uses the model {_model(arm.arm.model)}, but the grid uses {model}. All arms of a "
                "grid share one base: set [model] in the grid."
            )
        unmatched = [arm.arm.loss.get("contrast"), arm.arm.data.pairing]
        if min(tables.examples) < 2 and ("unpaired" in unmatched or "shuffled" in unmatched):
            raise ArmError(
                f"Arm {arm.name!r} takes rejected answers from another pair, but examples={tables.examples} includes "
                "a training set of one pair. Ask for 2 or more."
            )


def check_draws(tasks: list[TaskTable]) -> None:
    """Refuse tasks that train on the same rows and would still count as independent."""
    drawn: dict[tuple[str, int], TaskTable] = {}
    for task in tasks:
        twin = drawn.setdefault((task.name, task.draw), task)
        if twin is not task:
            raise ArmError(
                f"Tasks {twin.label!r} and {task.label!r} would train on the same rows of {task.name!r} but count as "
                f"independent: give one of them draw = {task.draw + 1}."
            )


def check_prompts(tables: GridTables, arms: list[GridArm], tasks: list[TaskTable]) -> None:
    """Refuse prompts for which there are too few examples or instructions."""
    for arm in arms:
        prompt = arm.arm.get(Prompt)
        if prompt.demonstrations > min(tables.examples) and not prompt.fewer:
            raise ArmError(
                f"Arm {arm.name!r} shows {prompt.demonstrations} demonstrations, but examples={tables.examples}. Ask "
                "for more examples, or show fewer."
            )
        if prompt.instruction and arm.budget.per == "grid" and len(tasks) > 1:
            raise ArmError(
                f"Arm {arm.name!r} gives an instruction of the task, but budget.per='grid' chooses one for all tasks. "
                "Use budget.per = 'arm'."
            )
        for task in tasks if prompt.instruction else ():
            if not 1 <= len(task.instructions) <= arm.budget.trials or not all(map(str.strip, task.instructions)):
                raise ArmError(
                    f"Arm {arm.name!r} gives an instruction, but task {task.label!r} has instructions="
                    f"{task.instructions}. Give one or more, but not more than the {arm.budget.trials} trials of the "
                    "budget, and none that is blank."
                )


def check_views(tables: GridTables, arms: list[GridArm], tasks: list[TaskTable]) -> None:
    """Refuse views that show more other examples than the smallest training set has, and instructions in an arm's file
    that are about that arm's own task, if the grid has other tasks."""
    for arm in arms:
        written_for = arm.arm.data.name
        others = [t.called for t in tasks if Path(t.name).name != Path(written_for).name or t.reverse or t.columns]
        for key, view in arm.arm.get(Views).views(known=arm.arm.get(Teachers).tables).items():
            if isinstance(view, Instruction) and arm.levels is None and others:
                raise ArmError(
                    f"Arm {arm.name!r} has an instruction about {written_for!r} at its view {key!r}, but the grid has "
                    f"the task {others[0]!r}. Leave the arm out, or run it in a grid with {written_for!r} alone."
                )
            if isinstance(view, Demonstrations) and not view.pool and view.k >= min(tables.examples):
                raise ArmError(
                    f"Arm {arm.name!r} shows {view.k} other examples at its view {key!r}, but examples="
                    f"{tables.examples}. Ask for {view.k + 1} or more, or lower views.{key}.k."
                )


def _model(table: ModelTable) -> dict[str, Any]:
    return table.model_dump(exclude={"threads"})


def check_card(tables: GridTables, card: Card, arms: list[GridArm]) -> None:
    claim = tables.claim
    if claim is None:
        raise ArmError(
            "The grid has no [claim]: which arm does the hypothesis say is `better`, `than` which, on which `measure`?"
        )
    moving = [f for f, level in tables.design.start.items() if tables.design.end.get(f, level) != level]
    if claim.factor is not None and claim.factor not in moving:
        raise ArmError(
            f"claim.factor={claim.factor!r} does not differ between design.start and design.end: {moving} do."
            f"{nearest(claim.factor, moving)}"
        )
    if claim.recovers is not None and (claim.margin or claim.factor):
        raise ArmError(
            f"claim.recovers={claim.recovers} is a share of a gain. Leave out claim.margin and claim.factor."
        )
    if claim.strength == "frontier" and len(tables.matched.frontier) < 2:
        raise ArmError(
            f"claim.strength='frontier', but matched.frontier={tables.matched.frontier} has fewer than two KLs. List "
            "two or more, such as [0.03, 0.1, 0.3]."
        )
    if measures.get(claim.measure).better == "lower":
        raise ArmError(
            f"claim.measure={claim.measure!r}: a claim says that the value of `better` is higher, but lower values of "
            f"this measure are better. Choose another, such as {', '.join(measures.ranked()[:3])}."
        )
    if "answers" in measures.get(claim.measure).needs and not tables.generations:
        raise ArmError(f"claim.measure={claim.measure!r}, but generations=0: nothing would be generated to score.")
    names = [arm.name for arm in arms]
    for pattern in card.affordances:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ArmError(
                f"card.affordances: {pattern!r} matches no arm of the grid: {names}.{nearest(pattern, names)}"
            )
    for name in names:
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in card.affordances):
            raise ArmError(f"card.affordances leaves out arm {name!r}: which data, labels and compute does it use?")
    for what in ("better", "than"):
        name = getattr(claim, what)
        if name not in names:
            raise ArmError(f"claim.{what}={name!r} is not an arm of the grid: {names}.{nearest(name, names)}")
    _check_decidable(claim, arms)
    for what, point in (("than", tables.design.start), ("better", tables.design.end)) if claim.factor else ():
        if getattr(claim, what) != (name := arm_name(tables, point)):
            raise ArmError(
                f"claim.factor={claim.factor!r} is about the gap from design.start to design.end, so claim.{what} "
                f"must be {name!r} (got {getattr(claim, what)!r})."
            )


def _check_decidable(claim: Claim, arms: list[GridArm]) -> None:
    """Refuse a comparison of an arm with itself, and one at a strength that an arm does not have."""
    if claim.better == claim.than:
        raise ArmError(f"claim.better and claim.than are both {claim.than!r}: compare two arms.")
    compared = {arm.name: arm for arm in arms if arm.name in (claim.better, claim.than)}
    rigid = [name for name, arm in compared.items() if arm.arm.get(Prompt) or not has_strength(arm.arm)]
    if claim.strength != "tuned" and rigid:
        raise ArmError(
            f"claim.strength={claim.strength!r}, but {rigid} have no strength that could be matched. Set "
            "claim.strength = 'tuned', or make the claim about another arm."
        )
