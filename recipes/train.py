"""Train one arm and measure its effect.

    accelerate launch recipes/train.py
    accelerate launch -m steertune.recipes.train vector_sft --data.name my_pairs.jsonl --adapter.layers 12

Every key of the arm can be set as `--table.key value`: `--data.name` (an embedded task, a file or folder of pairs, a
Hub name), `--model.name`, `--adapter.layers`, `--loss.name`, `--trainer.max_steps`, `--output.folder`, ...
Ends with a page. Its first line says how the answers changed, whether it is too much, and which strength to use; then
follow every measure of `lab/measures/` before, after and at other strengths, generations, and cost.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset

from steertune.adapters.card import write_card
from steertune.adapters.description import write_description
from steertune.recipes.lab import scorers
from steertune.recipes.lab.arm import Arm, load_arm
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.behaviours import read_behaviour
from steertune.recipes.lab.cards import of_training
from steertune.recipes.lab.checks import check_start
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.cut_answers import too_short
from steertune.recipes.lab.data import Data, load_data, load_model, model_has_template
from steertune.recipes.lab.descriptions import data_of, strength_of
from steertune.recipes.lab.evaluate import evaluate, evaluate_base
from steertune.recipes.lab.forms import conversations, notes_on_form, readable
from steertune.recipes.lab.memory import peak_memory_gb
from steertune.recipes.lab.observe import FEW_NEUTRAL, HeldOut
from steertune.recipes.lab.options import ArmName, Threads
from steertune.recipes.lab.pages import in_terminal, prose, settings_in_words, write_page
from steertune.recipes.lab.pages.measured import training_page
from steertune.recipes.lab.pages.verdict import alike
from steertune.recipes.lab.pair_lint import at_edge, warn, warn_of
from steertune.recipes.lab.progress import Bar, progress
from steertune.recipes.lab.rehearsal import rehearse, rehearse_training
from steertune.recipes.lab.rows import Record
from steertune.recipes.lab.scorers import Scorer
from steertune.recipes.lab.similarity import text_of
from steertune.recipes.lab.training import (
    Asked,
    claimed,
    facts_of,
    held_out_of,
    open_run,
    prompts_to_answer,
    steps_of,
    train_and_save,
    training_of,
)
from steertune.trainers import ModelAt, scalable

_FEWEST_PAIRS = 10  # needed to fit a classifier of chosen and rejected answers


@command
def main(arm: ArmName = "vector_sft", threads: Threads = None, overrides: Sequence[str] = ()) -> Result | None:
    """Train the arm and evaluate it; only the first of several processes returns the result."""
    with progress("Training"):
        record = run(load_arm(arm, overrides, recipe="train"), threads)
    if not PartialState().is_main_process:
        return None
    return Result({**record.to_json(), "measures": record.means()}, "")


def run(arm: Arm, threads: int | None = None) -> Record:
    """Train and evaluate an arm in its output folder; return the content of `result.json`.

    An interrupted run continues from its last checkpoint; a folder with another arm or a finished run is refused.

    Raises:
        ArmError: the folder holds something else.
    """
    started = time.monotonic()
    folder, state = open_run(arm, threads=threads), PartialState()
    ready = _prepare(arm)
    held_out, test = ready.held_out, ready.held_out.pairs
    training_seconds, evaluation_seconds = _estimate(arm, ready)
    if state.is_main_process:
        print(_plan(arm, ready.data, state.num_processes, training_seconds, evaluation_seconds))
    strengths = len(arm.evaluation.strengths)
    bar = Bar(training_seconds + evaluation_seconds * (1 + strengths))

    # the base model comes first, since training may change it
    count = len(ready.train)
    record = Record({"arm": arm.name, "task": Path(arm.data.name).name, "examples": count, "seed": arm.data.seed})
    with bar.step("base model", evaluation_seconds):
        record.observations |= evaluate_base(held_out)
    if state.is_main_process:
        warn([at_edge(record.value("accuracy"), len(test))], arm.data.name)

    training = training_of(arm, held_out.model, held_out.tokenizer, ready.train, folder, held_out=[test])
    training.notes |= {"rows": " ".join(ready.notes)} if ready.notes else {}
    with bar.step("training", training_seconds), claimed(folder, arm, state.is_main_process):
        trainer, model, seconds = train_and_save(training, ready.data)
    others = [s for s in arm.evaluation.strengths if s not in (0.0, 1.0)] if scalable(model) else []
    with bar.step("evaluation", evaluation_seconds * strengths):
        record.observations |= evaluate(model, held_out, strengths=[1.0, *others])

    record.facts = {
        **facts_of(training, held_out),
        "scorer": held_out.scorer.note if held_out.scorer is not None else "",
        "split": ready.data.note,
        "held_out": len(test),
        "asked": ready.asked,
        "chosen_alike": alike(_answers_of(training.rows)),
        "parameters": trainer.get_num_trainable_parameters(),
        "steps": trainer.state.global_step,
        "train_seconds": seconds,
        "seconds": time.monotonic() - started,
        "peak_memory_gb": peak_memory_gb(),
        "processes": state.num_processes,
    }
    if state.is_main_process:
        page = _write(arm, record, training.rows, folder)
        print(f"\n{in_terminal(page)}\nThe page with strengths and answers: {page.with_suffix('.html')}, and {page}")
    return record


@dataclass(frozen=True)
class _Ready:
    """Everything that a run needs, loaded and tried on one row before any work.

    Attributes:
        data: The rows as they were read.
        train: Training rows in the form that the model reads.
        held_out: The examples that models are measured on.
        asked: The kind of prompts that are answered.
        notes: Notes on the rows.
    """

    data: Data
    train: Dataset
    held_out: HeldOut
    asked: Asked
    notes: list[str]


def _prepare(arm: Arm) -> _Ready:
    """Read the rows, load the model, and try one row of everything."""
    data = load_data(arm.data, partial(model_has_template, arm.model))
    check_start(arm, data.train)
    if PartialState().is_main_process:
        warn_of(data.all_rows(), data.by, arm.data.name)
    model, tokenizer = load_model(arm.model)
    train, test = (readable(rows, tokenizer) for rows in (data.train, data.test))
    held_out = held_out_of(arm, model, tokenizer, test, scorer=_scorer(arm, train, model, tokenizer))
    asked, held_out.asked = prompts_to_answer(train, test, held_out.neutral)
    rehearse(held_out)
    notes = [*notes_on_form(data.train, tokenizer), *rehearse_training(arm, model, tokenizer, train)]
    if held_out.scorer is not None and held_out.generations:
        finding = too_short(train, held_out.scorer, tokenizer, held_out.new_tokens, "evaluation.new_tokens")
        notes += [finding.text] if finding is not None else []
    return _Ready(data, train, held_out, asked, notes)


def _scorer(arm: Arm, train: Dataset, model: Any, tokenizer: Any) -> Scorer | None:
    """The scorer of generated answers: the task's rule, or a classifier fitted on the training pairs.

    None if there are too few pairs.
    """
    if not {"chosen", "rejected"} <= set(train.column_names):
        return None
    table = read_behaviour(arm.data.name).scorer
    if table is not None and table.get("kind") == "rule":
        return scorers.fit(table, train, model, tokenizer)
    return scorers.fit({"kind": "characters"}, train, model, tokenizer) if len(train) >= _FEWEST_PAIRS else None


def _answers_of(rows: Dataset) -> list[str]:
    """The answers that are trained on, if they have a separate column."""
    column = next((name for name in ("chosen", "completion") if name in rows.column_names), None)
    return [] if column is None else [text_of(answer) for answer in rows[column]]


def _write(arm: Arm, record: Record, rows: Dataset, folder: Path) -> Path:
    """Write the page, the model card, the vector's description and the record; return the page."""
    what = (
        f"Adapter {settings_in_words(arm.adapter)}; loss {settings_in_words(arm.loss)}; {len(rows)} examples of "
        f"{arm.data.name}; base model {arm.model.name}. {prose(record.facts['split'])}"
    )
    page = write_page(training_page(record, what, _use(arm, folder)), folder)
    if (folder / "adapter" / "adapter_config.json").is_file():
        write_card(folder / "adapter", of_training(arm, record))
        write_description(folder / "adapter", strength_of(record), data_of(rows, arm.data.name))
    record.write(folder / "result.json")  # written last, since it marks the run as finished
    return page


def _estimate(arm: Arm, ready: _Ready) -> tuple[float, float]:
    """Seconds of training, and of an evaluation at one strength, from one timed forward pass."""
    pairs = max(1, arm.evaluation.batch_size // 2)
    model, test = ready.held_out.model, ready.held_out.pairs
    shown = test if len(test) else ready.train
    [batch] = batches(ready.held_out.tokenizer, shown.select(range(min(pairs, len(shown)))), pairs)
    with torch.no_grad():
        ModelAt(model, model, batch)(1.0)  # the first pass warms up
        start = time.monotonic()
        ModelAt(model, model, batch)(1.0)
    row = (time.monotonic() - start) / len(batch.labels)
    loss = arm.loss_object()
    sides = 2 if loss is None or loss.needs.pairs else 1
    examples = arm.trainer.get("per_device_train_batch_size", 8) * arm.trainer.get("gradient_accumulation_steps", 1)
    # the answers of pairs, neutral answers, and generated tokens at about a tenth of a row each
    measured_rows = 2 * len(test) + FEW_NEUTRAL + arm.evaluation.generations * arm.evaluation.new_tokens / 10
    # forward, backward, and the forward pass of a reference, each of about the same cost
    return steps_of(arm) * sides * examples * row * 3, measured_rows * row


def _plan(arm: Arm, data: Data, processes: int, training: float, evaluation: float) -> str:
    """The plan, and how long it will take."""
    evaluation *= 1 + len(arm.evaluation.strengths)
    return (
        f"Arm {arm.name}: adapter {settings_in_words(arm.adapter)}, loss {settings_in_words(arm.loss)}\n"
        f"  {len(data.train)} training examples and {len(data.test)} test examples of {arm.data.name}, read as "
        f"{'conversations' if conversations(data.train) else 'plain text'}, base {arm.model.name}, {processes} "
        "process(es)\n"
        f"  {data.note}\n"
        f"  about {(training + evaluation) / 60:.1f} minutes: training {training:.0f} s "
        f"({steps_of(arm)} steps), evaluation {evaluation:.0f} s"
    )


def _use(arm: Arm, folder: Path) -> list[str]:
    if arm.adapter.get("type") == "none":
        return [
            "from transformers import AutoModelForCausalLM",
            f'model = AutoModelForCausalLM.from_pretrained("{folder}/adapter")',
        ]
    embedded = arm.model.name == "embedded"
    lines = ["import steertune.adapters  # makes the method known to PEFT", "from peft import PeftModel"]
    lines += [
        "from steertune.recipes.lab.embedded import load_model"
        if embedded
        else "from transformers import AutoModelForCausalLM",
        "",
    ]
    base = "load_model()" if embedded else f'AutoModelForCausalLM.from_pretrained("{arm.model.name}")'
    return [*lines, f'model = PeftModel.from_pretrained({base}, "{folder}/adapter")']


if __name__ == "__main__":
    sys.exit(main())
