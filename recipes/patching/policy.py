"""The fix: an adapter trained on catches and corrections, and its effect on bad and on innocent requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from steertune.recipes.lab import trained_on
from steertune.recipes.lab.adapted import adapted
from steertune.recipes.lab.arm import Arm
from steertune.recipes.lab.evaluate import evaluate, evaluate_base
from steertune.recipes.lab.files import read_result, write_result
from steertune.recipes.lab.forms import readable
from steertune.recipes.lab.ingredients.views import Views
from steertune.recipes.lab.observe import HeldOut
from steertune.recipes.lab.progress import Bar
from steertune.recipes.lab.rows import Record
from steertune.recipes.lab.scorers import rule
from steertune.recipes.lab.training import fit, make_trainer, steps_of, training_of
from steertune.recipes.patching.case import CAUGHT, Case, dataset
from steertune.trainers import scalable, share_weights

INNOCENT = "innocent"
MEASURED = 64
"""The most innocent rows on which harm is measured, and the most rows of a group that are answered."""
QUESTIONS = 50
_NEUTRAL = 64  # innocent rows for the KL term in training
_GROUP = ("accuracy_per_token", "margin_per_token")
_HARM = ("kl", "kl_tail", "perplexity_ratio", "capability")


@dataclass
class Context:
    """The base model and the rows that every fix is measured on.

    Attributes:
        case: The transcripts.
        arm: The arm that is trained.
        model: The base model.
        tokenizer: Its tokenizer.
        held_out: Examples by group (`caught`, `near`, `far`, `innocent`); the base model's results on them are
            computed once.
    """

    case: Case
    arm: Arm
    model: Any
    tokenizer: Any
    held_out: dict[str, HeldOut]

    @classmethod
    def of(cls, case: Case, arm: Arm, model: Any, tokenizer: Any) -> Context:
        """The rows of a case as examples."""
        table = arm.evaluation
        scorer = (
            None if case.pattern is None else rule.fit(rule.Options(pattern=case.pattern), dataset([]), None, None)
        )
        innocent = _form(tokenizer, case.held_out[:MEASURED])
        no_rows = innocent.select([])
        groups: dict[str, HeldOut] = {}
        for name, group in case.groups.items():
            pairs = case.pairs(name)
            prompts = readable(group.rows.select_columns(["prompt"]), tokenizer)
            groups[name] = HeldOut(
                model,
                tokenizer,
                pairs=_form(tokenizer, pairs) if pairs else prompts.select([]),
                neutral=no_rows,
                asked=prompts,
                generations=min(MEASURED, len(prompts)),
                new_tokens=table.new_tokens,
                scorer=scorer,
                batch_size=table.batch_size,
            )
        groups[INNOCENT] = HeldOut(
            model,
            tokenizer,
            pairs=no_rows,
            neutral=innocent,
            asked=innocent.select_columns(["prompt"]),
            generations=min(16, len(innocent)),
            new_tokens=table.new_tokens,
            scorer=scorer,
            questions=QUESTIONS,
            batch_size=table.batch_size,
        )
        return cls(case, arm, model, tokenizer, groups)

    def names(self, group: str) -> list[str]:
        """The measures that are meaningful for a group."""
        held_out = self.held_out[group]
        behaviour = ["behaviour"] if held_out.scorer is not None else ["repetition"]
        return [*behaviour, *(_HARM if group == INNOCENT else _GROUP if held_out.has_pairs else ())]

    def measure(self, model: Any, count: int, strengths: Sequence[float]) -> dict[str, Record]:
        """Measurements of the fixed model and the base on every group."""
        bar = Bar(len(self.held_out))
        records = {}
        for name, held_out in self.held_out.items():
            with bar.step(f"{name} rows"):
                observed = evaluate_base(held_out, self.names(name)) | evaluate(
                    model, held_out, self.names(name), strengths
                )
                keys = {"arm": self.arm.name, "task": name, "examples": count, "seed": self.arm.data.seed}
                records[name] = Record(keys, observed)
        return records


def make_fix(context: Context, count: int, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Train the adapter on the first catches, or load it if an earlier run has saved it.

    Args:
        context: The base model and the rows.
        count: How many catches.
        folder: Folder of this fix; its adapter is saved in it.

    Returns:
        The model with the adapter, in evaluation mode, and facts about its training.
    """
    base = share_weights(context.model)
    home = folder / "adapter"
    trained = folder / "trained.json"
    if trained.exists():
        return adapted(base, home), read_result(trained, "Delete it to train the fix again.")
    rows = _form(context.tokenizer, training_rows(context.arm, context.case.pairs(CAUGHT)[:count]))
    innocent = _form(context.tokenizer, context.case.innocent).to_list()
    training = training_of(with_innocent(context.arm, innocent), base, context.tokenizer, rows, folder)
    trainer = make_trainer(training)
    seconds = fit(trainer, folder)
    trainer.save_model(str(home))
    caught = context.case.caught.rows.select_columns(["prompt"]).select(range(count))
    trained_on.write(home, trained_on.sets_of(caught, "prompt", caught))
    facts = {"train_seconds": seconds, "parameters": trainer.get_num_trainable_parameters(), "notes": training.notes}
    write_result(trained, facts)
    return trainer.accelerator.unwrap_model(trainer.model).eval(), facts


def training_rows(arm: Arm, pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs, repeated to fill all steps, so that each repetition is trained together with different innocent rows
    (the loss's neutral text). Without `max_steps` nothing is repeated, since that would make epochs longer."""
    table = arm.trainer
    if table.get("max_steps", -1) <= 0:
        return [*pairs]
    rows = steps_of(arm) * table.get("per_device_train_batch_size", 8) * table.get("gradient_accumulation_steps", 1)
    return [pairs[i % len(pairs)] for i in range(max(rows, len(pairs)))]


def with_innocent(arm: Arm, innocent: Sequence[dict[str, Any]]) -> Arm:
    """The arm, with the first innocent rows as neutral text if its loss uses any."""
    if "neutral" not in arm.views_seen():
        return arm
    tables = arm.get(Views).tables
    views = Views(**{**tables, "neutral": {**tables.get("neutral", {}), "rows": [*innocent[:_NEUTRAL]]}})
    return arm.model_copy(update={"ingredients": {**arm.ingredients, "views": views}})


def strengths_of(arm: Arm, model: Any) -> list[float]:
    """The strengths at which the fix from all catches is measured: the arm's strengths above 0, if it has any."""
    return sorted({1.0, *(s for s in arm.evaluation.strengths if s > 0)}) if scalable(model) else [1.0]


def _form(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> Dataset:
    return readable(dataset(rows), tokenizer)
