"""One cell of a grid: choose the settings on validation rows, train, measure on test rows, write the record.

tuned()    every trial of the budget is trained and scored on validation rows; the best one is kept
train()    the chosen setting, on the cell's own training rows
measure()  the trained model on test rows, at its tuned strength and at those with the grid's KLs to the base
"""

from __future__ import annotations

import copy
import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock
from scipy.stats import sem
from transformers import set_seed

from steertune.adapters import SteeringVectorConfig
from steertune.adapters.card import versions
from steertune.recipes.ablation.budget import Setting, draw, untrained_strengths
from steertune.recipes.ablation.checks import has_one_layer, has_strength
from steertune.recipes.ablation.context import Context, instructions
from steertune.recipes.ablation.grid import Cell
from steertune.recipes.ablation.kl_search import strengths_at
from steertune.recipes.ablation.matched import Point
from steertune.recipes.ablation.trials import best_first, landed_at, landing_factor, lead
from steertune.recipes.ablation.winner import Trained
from steertune.recipes.lab.evaluate import evaluate, evaluate_base
from steertune.recipes.lab.files import ArmError, read_result, write_result
from steertune.recipes.lab.ingredients import Training
from steertune.recipes.lab.ingredients.prompt import Prompt
from steertune.recipes.lab.measures import Seen
from steertune.recipes.lab.memory import peak_memory_gb, reset_peak_memory
from steertune.recipes.lab.observe import Show
from steertune.recipes.lab.progress import Bar, track
from steertune.recipes.lab.rows import MATCHED, TUNED, Record, at_kl
from steertune.recipes.lab.training import QUIET, fit, make_trainer, silent
from steertune.trainers import NonFiniteError, scalable, share_weights, train_together

logger = logging.getLogger(__name__)


def run_cell(cell: Cell, context: Context, folder: Path) -> Record:
    """Run a cell and write its `cell.json`. A diverged training is a result, not an error."""
    started = time.monotonic()
    home = folder / cell.path
    home.mkdir(parents=True, exist_ok=True)
    reset_peak_memory()
    held_out = context.held_out(cell.task)
    record = Record(cell.keys)
    record.observations |= evaluate_base(held_out)
    record.facts |= {
        "key": cell.key,
        "status": "ok",
        "error": None,
        "scalable": has_strength(cell.arm.arm),
        "versions": versions(),
        "scorer": held_out.scorer.note if held_out.scorer is not None else None,
    }

    # settings are chosen on validation rows, once for all cells that share them
    bar = Bar(len(cell.arm.budget.rungs) + 2)
    with bar.step("tuning", len(cell.arm.budget.rungs)):
        tuning = tuned(cell, context, folder)
    record.facts |= {"tuning_key": cell.tuning_key, "tuning": tuning["trials"]}
    record.facts |= {"tuning_seconds": tuning["seconds"], "setting": tuning["best"], **lead(tuning["trials"])}
    if tuning["best"] is None:
        record.facts |= {"status": "diverged", "error": "every trial of the tuning diverged"}
    else:
        try:
            _train_and_measure(cell, context, tuning, record, home, bar)
        except NonFiniteError as error:
            record.facts |= {"status": "diverged", "error": str(error)}
    record.facts |= {"seconds": time.monotonic() - started, "peak_memory_gb": peak_memory_gb()}
    shutil.rmtree(home / "checkpoints", ignore_errors=True)
    record.write(home / "cell.json")
    return record


def _place(cell: Cell, setting: Setting, seed: int) -> tuple[Any, ...]:
    """Everything that decides the result of a training."""
    return cell.arm.name, cell.task.label, cell.examples, seed, setting.rate, setting.steps, setting.layer


def _train_and_measure(
    cell: Cell, context: Context, tuning: dict[str, Any], record: Record, home: Path, bar: Bar
) -> None:
    """The part of a cell after its tuning."""
    setting = Setting(**tuning["best"])
    with bar.step("training"):
        # its own tuning may have trained the model already
        place = _place(cell, setting, cell.seed)
        trained = context.winner.take(place) or train(cell, context, setting, cell.seed, home)
    task, examples, seed = cell.tuned_at
    if place == _place(replace(cell, task=task, examples=examples), setting, seed):
        # the KLs that the tuning measured for this model, even if the run was interrupted in between
        trained.kls |= {(strength, rows): kl for strength, rows, kl in tuning["kls"]}
    record.facts |= trained.cost
    held_out = context.held_out(cell.task)
    show = context.show(cell, cell.seed, setting.prompt)
    record.facts["prompt_tokens"] = context.prompt_tokens(cell, show) if cell.arm.arm.get(Prompt) else 0.0
    with bar.step("measuring"), held_out.remember(trained.model):
        measure(cell, context, trained, setting.strength, show, record)
    if record.facts["scalable"] and record.facts["matched_strength"] is None:
        kl = context.grid.tables.matched
        error = f"no strength up to {kl.largest_strength:g} has a KL of {kl.kl:g} to the base"
        record.facts |= {"status": "unmatched", "error": error}


# -- tuning ------------------------------------------------------------


def tuned(cell: Cell, context: Context, folder: Path) -> dict[str, Any]:
    """The setting that is best on the validation rows, with all trials; computed once for cells that share it."""
    file = folder / cell.tuning_file
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):  # another process may be tuning for the same cells
        if file.exists() and (tuning := _read_tuning(file, cell.tuning_key)) is not None:
            return tuning
        start = time.monotonic()
        context.winner.clear()
        task, examples, seed = cell.tuned_at
        tuned_cell = replace(cell, task=task, examples=examples)
        trials = _trials(tuned_cell, context, seed, file.parent)
        trials += _landings(tuned_cell, context, seed, file.parent, trials)
        best = next(iter(best_first(trials)), None)
        tuning = {
            "key": cell.tuning_key,
            "trials": trials,
            "best": None if best is None else {k: best[k] for k in ("rate", "steps", "layer", "strength", "prompt")},
            "kls": context.winner.kls,
            "seconds": time.monotonic() - start,
        }
        write_result(file, tuning)
    return tuning


def _landings(
    cell: Cell, context: Context, seed: int, home: Path, trials: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Repeat the best trial with a learning rate at which training ends near the strength that is used: the length of
    a trained vector grows roughly in proportion to the rate."""
    added: list[dict[str, Any]] = []
    table = context.grid.tables.matched
    for _ in range(cell.arm.budget.landed):
        best = next(iter(best_first([*trials, *added])), None)
        if best is None or not best["matched"] or best["landed"] == 1 or not best["steps"]:
            break
        factor = landing_factor(best["strength"], table.kl, table.targets)
        setting = Setting(rate=best["rate"] * factor, steps=best["steps"], layer=best["layer"])
        [trained] = _train_trials(cell, context, [setting], seed, home / f"{cell.arm.name}.trial")
        added += _score_trial(cell, context, setting, trained, "matched", seed)
    return added


def _read_tuning(file: Path, key: str) -> dict[str, Any] | None:
    """A finished tuning; None if it belongs to other settings, or is damaged."""
    try:
        tuning = read_result(file, "It is repeated.")
        if tuning["key"] != key:
            return None
        if tuning["best"] is not None:
            Setting(**tuning["best"])
        tuning.setdefault("kls", [])  # older versions did not store them
        return {name: tuning[name] for name in ("key", "trials", "best", "kls", "seconds")}
    except (ArmError, KeyError, TypeError) as error:
        logger.warning("%s is not a usable tuning (%r): it is repeated.", file, error)
        return None


def _trials(cell: Cell, context: Context, seed: int, home: Path) -> list[dict[str, Any]]:
    """Every trial at every strength, with its score on the validation rows; with halving, those of the last rung."""
    budget, folder = cell.arm.budget, home / f"{cell.arm.name}.trial"
    if cell.arm.arm.get(Prompt):  # nothing to train, so the trials are instructions
        tried = [Setting(prompt=i) for i in range(len(instructions(cell)))]
        return [t for s in tried for t in _score_trial(cell, context, s, Trained(context.model, {}), [1.0], seed)]
    layered = has_one_layer(cell.arm.arm)
    if cell.arm.arm.trainer.get("max_steps") == 0:  # nothing to train, so the trials are layers and strengths
        tried = [Setting(layer=layer) for layer in budget.layers if layered] or [Setting()]
        models, strengths = _train_trials(cell, context, tried, seed, folder), untrained_strengths(budget, len(tried))
        return [t for s, trained in zip(tried, models, strict=True)
                for t in _score_trial(cell, context, s, trained, strengths, seed)]  # fmt: skip
    settings, results = draw(budget, seed, layered), []
    bar = Bar(sum(count * fraction for count, fraction in budget.rungs))
    for rung, (count, fraction) in enumerate(budget.rungs):
        tried = settings[:count]
        models = _train_trials(cell, context, [s.part(fraction) for s in tried], seed, folder)
        with bar.step(f"rung {rung + 1}" if len(budget.rungs) > 1 else "", count * fraction):
            results = [
                _score_trial(cell, context, setting, trained, budget.strengths, seed, fraction == 1)
                for setting, trained in zip(track(tried, "trial"), models, strict=True)
            ]
        # best first, for the next rung; a diverged trial has no score
        order = sorted(range(len(results)), key=lambda i: -max(t["score"] or -math.inf for t in results[i]))
        settings = [settings[i] for i in order]
        if rung + 1 < len(budget.rungs) and not any(t["score"] is not None for trials in results for t in trials):
            break
    return [trial for trials in results for trial in trials]


def _train_trials(
    cell: Cell, context: Context, settings: Sequence[Setting], seed: int, home: Path
) -> Iterator[Trained | None]:
    """The trained model of every setting; None if it diverged."""
    alike = len({setting.layer for setting in settings}) == 1
    if len(settings) > 1 and alike and _pays_together(cell, context):
        made = [make_cell_trainer(cell, context, s, seed, home / str(i)) for i, s in enumerate(settings)]
        start = time.monotonic()
        results = train_together([trainer for trainer, _ in made])
        seconds = (time.monotonic() - start) / len(made)
        for (trainer, training), result in zip(made, results, strict=True):
            diverged = isinstance(result, NonFiniteError)
            yield None if diverged else Trained(trainer.model.eval(), _cost(trainer, training, seconds))
    else:
        for setting in settings:
            try:
                yield train(cell, context, setting, seed, home)
            except NonFiniteError:
                yield None
    shutil.rmtree(home, ignore_errors=True)


def _pays_together(cell: Cell, context: Context) -> bool:
    """Whether trials train side by side: steering vectors do on a GPU. A CPU gains nothing from larger matrix products
    (`docs/results/benchmark/table.md`)."""
    arm = cell.arm.arm
    loss = arm.loss_object()
    if loss is None or loss.needs.views or loss.needs.states or arm.trainer.get("gradient_checkpointing"):
        return False  # each of these needs separate passes
    return isinstance(arm.peft_config(), SteeringVectorConfig) and context.model.device.type != "cpu"


def _score_trial(
    cell: Cell,
    context: Context,
    setting: Setting,
    trained: Trained | None,
    strengths: Sequence[float] | Literal["matched"],
    seed: int,
    whole: bool = True,
) -> list[dict[str, Any]]:
    """A trial's scores on the validation rows, one entry for each strength. `trained` is None if it diverged; `whole`
    says that it was trained for all of its steps, so that its model can become the cell's."""
    trial = {"rate": setting.rate, "steps": setting.steps, "layer": setting.layer, "prompt": setting.prompt}
    if trained is None:
        nothing = {"strength": None, "matched": False, "landed": 0.0, "accuracy": None, "score": None, "error": None}
        return [{**trial, **nothing}]
    model, matched, landed, table = trained.model, True, 1.0, context.grid.tables.matched
    held_out = replace(context.held_out(cell.task), pairs=context.splits(cell.task).validation)
    with held_out.remember(model):
        if strengths == "matched":
            points, _ = frontier_of(cell, context, trained, [table.kl])
            matched = all(point.reached for point in points)
            strengths = [point.strength for point in points if point.reached] or [1.0]
            if matched and points and setting.steps:  # closed forms have no strength of their own
                landed = landed_at(strengths[0], table.kl, table.targets)
        elif not _has_strength(cell, model):
            strengths = [1.0]
        behind = held_out.behind(context.show(cell, seed, setting.prompt))
        observed = evaluate(model, behind, ["margin_per_token"], {repr(strength): strength for strength in strengths})
    entries = []
    for strength in strengths:
        seen = Seen(observed[repr(strength)])
        accuracy, margins = float(seen["accuracy"].mean()), seen["margin_per_token"]
        # a smooth score: on a few dozen rows, accuracies are tied or differ by one row
        score = float(margins.mean()) if np.isfinite(margins).all() else None
        scores = {"accuracy": accuracy, "score": score, "error": float(sem(margins)) if len(margins) > 1 else None}
        entries.append({**trial, "strength": strength, "matched": matched, "landed": landed, **scores})
    if whole and model is not context.model:
        context.winner.offer(_place(cell, setting, seed), entries, trained)
    return entries


# -- training ------------------------------------------------------------


def make_cell_trainer(cell: Cell, context: Context, setting: Setting, seed: int, home: Path) -> tuple[Any, Training]:
    """The trainer of a cell's arm, on a fresh model (a copy, or for steering vectors the base's own weights), and the
    training after its ingredients have changed it."""
    arm = cell.arm.arm
    vector = isinstance(arm.peft_config(), SteeringVectorConfig)
    model = share_weights(context.model) if vector else copy.deepcopy(context.model)
    set_seed(seed)
    training = context.training(cell, seed, model, home, setting)
    return silent(make_trainer(training, context.prefix, **QUIET)), training


def train(cell: Cell, context: Context, setting: Setting, seed: int, home: Path) -> Trained:
    """Train a fresh model.

    Raises:
        NonFiniteError: the training diverged.
    """
    if cell.arm.arm.get(Prompt):
        free = ("train_seconds", "steps", "pairs_read", "tokens_read", "parameters")
        return Trained(context.model, dict.fromkeys(free, 0))
    trainer, training = make_cell_trainer(cell, context, setting, seed, home)
    seconds = fit(trainer, home)
    return Trained(trainer.model.eval(), _cost(trainer, training, seconds))


def _cost(trainer: Any, training: Training, seconds: float) -> dict[str, Any]:
    """The cost of a training, for its record."""
    batch = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    pairs = trainer.state.global_step * batch
    # tokens that a training step runs the model on
    sides = ("chosen_ids", "rejected_ids") if trainer.loss is None or trainer.loss.needs.pairs else ("chosen_ids",)
    tokens = sum(len(row["prompt_ids"]) + len(row[side]) for row in trainer.train_dataset for side in sides)
    return {
        "train_seconds": seconds,
        "steps": trainer.state.global_step,
        "pairs_read": pairs,
        "tokens_read": round(pairs * tokens / len(trainer.train_dataset)),
        "parameters": trainer.get_num_trainable_parameters() if trainer.args.max_steps else 0,
        "notes": training.notes,
    }


# -- measuring ------------------------------------------------------------


def measure(cell: Cell, context: Context, trained: Trained, strength: float, show: Show, record: Record) -> None:
    """Measure the trained model on the test rows, which are read only here, at the strength that the tuning chose and
    at those of the frontier. The observations are added to the record.

    Raises:
        NonFiniteError: log-probabilities of the trained model are not finite.
    """
    model, table = trained.model, context.grid.tables.matched
    points, falls = frontier_of(cell, context, trained, table.targets)
    matched = next((point.strength for point in points if point.target == table.kl and point.reached), None)
    if cell.arm.budget.strengths == "matched":  # of this training set, not of the one that the tuning saw
        strength = matched or strength
    strengths = {TUNED: strength} | ({MATCHED: matched} if matched else {})
    strengths |= {at_kl(point.target): point.strength for point in points if point.target in table.frontier}
    held_out = context.held_out(cell.task).behind(show)
    unanswered = {at_kl(kl) for kl in table.targets if table.answers and kl not in table.answers}
    quiet = {at: strengths.pop(at) for at in [*strengths] if at in unanswered}
    observed = evaluate(model, held_out, strengths=strengths)
    if quiet:
        observed |= evaluate(model, held_out.without_answers(), strengths=quiet)
    if not all(np.isfinite(Seen(values)["margin"]).all() for values in observed.values()):
        raise NonFiniteError("The last update left a model whose log-probabilities are not finite.")
    record.facts |= {"scalable": _has_strength(cell, model), "tuned_strength": strength, "matched_strength": matched}
    record.facts |= {"frontier": [asdict(point) for point in points], "kl_falls": falls}
    record.observations |= observed


def frontier_of(cell: Cell, context: Context, trained: Trained, targets: Sequence[float]) -> tuple[list[Point], bool]:
    """The strengths with these KLs to the base on the rows for matching; none if the model has no strength.

    Returns:
        The points, and whether the KL was seen to fall while the strength grew.
    """
    if not _has_strength(cell, trained.model):
        return [], False
    largest, held_out = context.grid.tables.matched.largest_strength, context.held_out(cell.task)
    return strengths_at(trained.model, held_out, targets, largest, measured=trained.kls)


def _has_strength(cell: Cell, model: Any) -> bool:
    return has_strength(cell.arm.arm) and scalable(model)
