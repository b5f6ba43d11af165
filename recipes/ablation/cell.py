"""One cell of a grid: choose the settings on validation rows, train, measure on test rows, write `cell.json`."""

from __future__ import annotations

import copy
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from filelock import FileLock
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import set_seed

from steertune.adapters import SteeringVectorConfig
from steertune.adapters.card import versions
from steertune.recipes.ablation.bench import Bench
from steertune.recipes.ablation.budget import Setting, draw, untrained_strengths
from steertune.recipes.ablation.checks import has_strength
from steertune.recipes.ablation.grid import Cell
from steertune.recipes.ablation.keys import VERSION
from steertune.recipes.ablation.matched import matched_strength, refined
from steertune.recipes.ablation.prompted import Show, candidates, prompt_tokens, shown
from steertune.recipes.lab.files import ArmError, read_result, write_result
from steertune.recipes.lab.measures import (
    generate,
    neutral_logps,
    pair_margins,
    peak_memory_gb,
    repetition,
    reset_peak_memory,
    side_effects,
)
from steertune.recipes.lab.training import fit, make_trainer, silent
from steertune.trainers import NonFiniteError, scalable, scaled, share_weights, train_together

logger = logging.getLogger(__name__)

FEW_NEUTRAL = 4
"""Rows that the search of the matched strength starts with."""


def run_cell(cell: Cell, bench: Bench, folder: Path) -> dict[str, Any]:
    """Run a cell and leave its `cell.json`. A diverged training is a result, not an error.

    Args:
        cell: What to run.
        bench: The base model, the tasks' rows, and what is known of the base on them.
        folder: The grid's folder.
    """
    started = time.monotonic()
    home = folder / cell.path
    home.mkdir(parents=True, exist_ok=True)
    reset_peak_memory()
    found: dict[str, Any] = {
        "version": VERSION,
        "key": cell.key,
        "task": cell.task.label,
        "arm": cell.arm.name,
        "levels": cell.arm.levels,
        "examples": cell.examples,
        "seed": cell.seed,
        "status": "ok",
        "error": None,
        "scalable": has_strength(cell.arm.arm),
        "versions": versions(),
        "scorer": bench.scorer(cell.task).note if bench.grid.tables.generations else None,
        **bench.base_measures(cell.task),
    }
    tuning = tuned(cell, bench, folder)
    found |= {"tuning": tuning["trials"], "tuning_seconds": tuning["seconds"], "setting": tuning["best"]}
    if tuning["best"] is None:
        found |= {"status": "diverged", "error": "every trial of the tuning diverged"}
    else:
        setting = Setting(**tuning["best"])
        try:
            model, cost = train(cell, bench, setting, cell.seed, home)
            with bench.remembering(model):
                show = shown(cell, bench, cell.seed, setting.prompt)
                found |= cost | measure(cell, bench, model, setting.strength, show)
            if cell.arm.arm.augmentation:
                found["augmentation"] = bench.training_set(cell, cell.seed).note
            if found["scalable"] and found["matched_strength"] is None:
                kl = bench.grid.tables.matched
                error = f"no strength up to {kl.largest_strength:g} has a KL of {kl.kl:g} to the base"
                found |= {"status": "unmatched", "error": error}
        except NonFiniteError as error:
            found |= {"status": "diverged", "error": str(error)}
    found |= {"seconds": time.monotonic() - started, "peak_memory_gb": peak_memory_gb()}
    shutil.rmtree(home / "checkpoints", ignore_errors=True)
    write_result(home / "cell.json", found)
    return found


def tuned(cell: Cell, bench: Bench, folder: Path) -> dict[str, Any]:
    """The setting that is best on the validation rows, with all trials; computed once for cells that share it."""
    file = folder / cell.tuning_file
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):  # another runner may be at it
        if file.exists() and (known := _known_tuning(file, cell.tuning_key)) is not None:
            return known
        start = time.monotonic()
        task, examples, seed = cell.tuned_at
        trials = _trials(replace(cell, task=task, examples=examples), bench, seed, file.parent)
        scored = [t for t in trials if t["score"] is not None]
        # a trial that does not come to the grid's KL is at another one, where accuracy is cheaper or dearer
        best = max([t for t in scored if t["matched"]] or scored, key=lambda t: t["score"], default=None)
        result = {
            "key": cell.tuning_key,
            "trials": trials,
            "best": None if best is None else {k: best[k] for k in ("rate", "steps", "strength", "prompt")},
            "seconds": time.monotonic() - start,
        }
        write_result(file, result)
    return result


def _known_tuning(file: Path, key: str) -> dict[str, Any] | None:
    """What a file knows of a tuning; None if it is of other settings, or damaged."""
    try:
        known = read_result(file, "It is done again.")
        if known["key"] != key:
            return None
        if known["best"] is not None:
            Setting(**known["best"])
        return {name: known[name] for name in ("key", "trials", "best", "seconds")}
    except (ArmError, KeyError, TypeError) as error:
        logger.warning("%s is no tuning (%r): it is done again.", file, error)
        return None


def _trials(cell: Cell, bench: Bench, seed: int, home: Path) -> list[dict[str, Any]]:
    """Every trial at every strength, with its score on the validation rows; the last rung of a successive halving."""
    budget = cell.arm.budget
    if cell.arm.arm.prompt:  # nothing to train, so the trials are instructions
        tried = [Setting(prompt=i) for i in range(len(candidates(cell)))]
        return [t for s in tried for t in _measured(cell, bench, s, bench.model, [1.0], seed)]
    if cell.arm.arm.trainer.get("max_steps") == 0:  # nothing to train, so the trials are strengths
        [model] = _trained(cell, bench, [Setting()], seed, home / f"{cell.arm.name}.trial")
        return _measured(cell, bench, Setting(), model, untrained_strengths(budget), seed)
    settings, results = draw(budget, seed), []
    for rung, (count, fraction) in enumerate(budget.rungs):
        tried = settings[:count]
        models = _trained(cell, bench, [s.part(fraction) for s in tried], seed, home / f"{cell.arm.name}.trial")
        results = [_measured(cell, bench, s, m, budget.strengths, seed) for s, m in zip(tried, models, strict=True)]
        # best first, for the next rung; a diverged trial has no score
        order = sorted(range(len(results)), key=lambda i: -max(t["score"] or -math.inf for t in results[i]))
        settings = [settings[i] for i in order]
        if rung + 1 < len(budget.rungs) and not any(t["score"] is not None for trials in results for t in trials):
            break
    return [trial for trials in results for trial in trials]


def _trained(cell: Cell, bench: Bench, settings: Sequence[Setting], seed: int, home: Path) -> Iterator[Any]:
    """The model that every setting trains, None where it diverges."""
    if len(settings) > 1 and _pays_together(cell, bench):
        trainers = [trainer_of(cell, bench, s, seed, home / str(i)) for i, s in enumerate(settings)]
        for trainer, result in zip(trainers, train_together(trainers), strict=True):
            yield None if isinstance(result, NonFiniteError) else trainer.model.eval()
    else:
        for setting in settings:
            try:
                yield train(cell, bench, setting, seed, home)[0]
            except NonFiniteError:
                yield None
    shutil.rmtree(home, ignore_errors=True)


def _pays_together(cell: Cell, bench: Bench) -> bool:
    """Whether trials train side by side: steering vectors do on a GPU. A CPU has no use for larger products
    (`docs/results/benchmark/table.md`)."""
    arm = cell.arm.arm
    loss = arm.loss_object()
    if loss is None or loss.needs.views or loss.needs.states or arm.trainer.get("gradient_checkpointing"):
        return False  # each needs passes of its own
    return isinstance(arm.peft_config(), SteeringVectorConfig) and bench.model.device.type != "cpu"


def _measured(
    cell: Cell,
    bench: Bench,
    setting: Setting,
    model: Any,
    strengths: Sequence[float] | Literal["matched"],
    seed: int,
) -> list[dict[str, Any]]:
    """A trial's scores on the validation rows, one entry a strength; `model` None: it diverged."""
    trial = {"rate": setting.rate, "steps": setting.steps, "prompt": setting.prompt}
    if model is None:
        return [{**trial, "strength": None, "matched": False, "accuracy": None, "score": None}]
    matched = True
    with bench.remembering(model):
        if strengths == "matched":
            found, _ = _matched(cell, bench, model)
            matched = found is not None or not _scales(cell, model)
            strengths = [found or 1.0]
        elif not _scales(cell, model):
            strengths = [1.0]
        rows = shown(cell, bench, seed, setting.prompt)(bench.splits(cell.task).validation)
        margins = pair_margins(model, bench.tokenizer, rows, strengths, show=False)
    entries = []
    for strength in strengths:
        values = margins[strength]
        # accuracy decides; the likelihood of the preferences breaks its many ties
        score = accuracy(values) + float(logsigmoid(values / 10).mean()) / 1000 if values.isfinite().all() else None
        entries.append(
            {**trial, "strength": strength, "matched": matched, "accuracy": accuracy(values), "score": score}
        )
    return entries


def trainer_of(cell: Cell, bench: Bench, setting: Setting, seed: int, home: Path) -> Any:
    """The trainer of an arm, on a fresh model: a copy, or for steering vectors the base's own weights."""
    arm = cell.arm.arm
    rows = bench.training_set(cell, seed).rows
    arm = arm.model_copy(update={"data": arm.data.model_copy(update={"seed": seed, "train": cell.examples})})
    vector = isinstance(arm.peft_config(), SteeringVectorConfig)
    model = share_weights(bench.model) if vector else copy.deepcopy(bench.model)
    set_seed(seed)
    settings = {
        **setting.trainer(arm.trainer),
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    trainer = make_trainer(arm, model, bench.tokenizer, rows, home, bench.prefix, **settings)
    return silent(trainer)


def train(cell: Cell, bench: Bench, setting: Setting, seed: int, home: Path) -> tuple[Any, dict[str, Any]]:
    """Train a fresh model; return it, and what that cost.

    Raises:
        NonFiniteError: the training diverged.
    """
    if cell.arm.arm.prompt:
        free = ("train_seconds", "steps", "pairs_read", "tokens_read", "parameters")
        return bench.model, dict.fromkeys(free, 0)
    trainer = trainer_of(cell, bench, setting, seed, home)
    seconds = fit(trainer, home)
    model = trainer.model.eval()
    batch = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    return model, {
        "train_seconds": seconds,
        "steps": trainer.state.global_step,
        "pairs_read": trainer.state.global_step * batch,
        "tokens_read": round(trainer.state.global_step * batch * _tokens_of_a_pair(trainer)),
        "parameters": trainer.get_num_trainable_parameters() if trainer.args.max_steps else 0,
    }


def _tokens_of_a_pair(trainer: Any) -> float:
    """Mean number of tokens that a training step runs the model on, for one pair."""
    sides = ("chosen_ids", "rejected_ids") if trainer.loss is None or trainer.loss.needs.pairs else ("chosen_ids",)
    lengths = [len(row["prompt_ids"]) + len(row[side]) for row in trainer.train_dataset for side in sides]
    return sum(lengths) / len(trainer.train_dataset)


def measure(cell: Cell, bench: Bench, model: Any, strength: float, show: Show) -> dict[str, Any]:
    """What the trained model does, at its tuned strength and at the matched one. The test rows are read here only."""
    matched, neutral = _matched(cell, bench, model)
    if cell.arm.budget.strengths == "matched":  # of this training set, not of the one that the tuning saw
        strength = matched or strength
    found: dict[str, Any] = {"scalable": _scales(cell, model), "matched_strength": matched}
    if neutral is None or strength != matched:
        with scaled(model, strength):
            neutral = neutral_logps(model, bench.tokenizer, show(bench.neutral_data))
    found |= side_effects(neutral, bench.neutral)
    strengths = {"": strength} | ({"matched_": matched} if matched else {})
    base = bench.base(cell.task)
    plain = bench.splits(cell.task).test
    rows = show(plain)
    found["prompt_tokens"] = prompt_tokens(bench, plain, show) if cell.arm.arm.prompt else 0.0
    different = sorted(set(strengths.values()))
    margins = pair_margins(model, bench.tokenizer, rows, different, show=False)
    if not all(values.isfinite().all() for values in margins.values()):
        raise NonFiniteError("The last update left a model whose log-probabilities are not finite.")
    behaviours = {at: _behaviour(cell, bench, model, rows, at) for at in different}
    for prefix, at in strengths.items():
        values = preference(margins[at], base.margins) | behaviours[at]
        found |= {prefix + name: value for name, value in values.items()}
    return found


def _matched(cell: Cell, bench: Bench, model: Any) -> tuple[float | None, list[tuple[Tensor, Tensor]] | None]:
    """The strength with the grid's KL to the base on all neutral rows, within 3 %, and `neutral_logps` there; None if
    the model has no strength, or no such one."""
    if not _scales(cell, model):
        return None, None
    table, last = bench.grid.tables.matched, {}

    def kl(strength: float, rows: int) -> float:
        data = bench.neutral_data.select(range(min(rows, len(bench.neutral_data))))
        with scaled(model, strength):
            seen = neutral_logps(model, bench.tokenizer, data)
        last.clear()
        last[strength] = seen
        return side_effects(seen, bench.neutral[: len(seen)])["kl"]

    guess = matched_strength(lambda s: kl(s, FEW_NEUTRAL), table.kl, table.largest_strength)
    if guess is None:
        return None, None
    found = refined(lambda s: kl(s, len(bench.neutral)), table.kl, guess, table.largest_strength)
    return found, last.get(found)


def _behaviour(cell: Cell, bench: Bench, model: Any, rows: Dataset, strength: float) -> dict[str, Any]:
    tables = bench.grid.tables
    prompts = rows["prompt"][: tables.generations] if "prompt" in rows.column_names else []
    if not prompts:
        return {}
    with scaled(model, strength):
        answers = generate(model, bench.tokenizer, prompts, tables.new_tokens)
    return behaviour(bench.scorer(cell.task).score, prompts, answers)


def behaviour(score: Callable[..., list[float | None]], prompts: Sequence[Any], answers: list[str]) -> dict[str, Any]:
    """Mean score of the answers that could be judged, how many could not, and how much they repeat themselves."""
    from steertune.recipes.lab.scorers import plain

    scores = score([plain(prompt) for prompt in prompts], answers)
    judged = [s for s in scores if s is not None]
    return {
        "behaviour": sum(judged) / len(judged) if judged else None,
        "behaviours": scores,
        "judgements_failed": len(scores) - len(judged),
        "repetition": repetition(answers),
        "answers": answers,
    }


def preference(margins: Tensor, base: Tensor) -> dict[str, Any]:
    """Held-out preference: accuracy, mean margin, gain over the base, and the share of pairs moved the wrong way."""
    return {
        "accuracy": accuracy(margins),
        "margin": float(margins.mean()),
        "margin_gain": float((margins - base).mean()),
        "moved_wrong": float((margins < base).float().mean()),
        "margins": [round(float(m), 4) for m in margins],
    }


def _scales(cell: Cell, model: Any) -> bool:
    return has_strength(cell.arm.arm) and scalable(model)


def accuracy(margins: Tensor) -> float:
    """Share of pairs whose chosen answer is likelier; a tie counts half."""
    return float((torch.sign(margins) + 1).div(2).mean())
