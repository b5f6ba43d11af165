"""Make the embedded vectors: the default arm on every embedded task, each with a card and a frontier, and a table.

    steertune zoo --vectors recipes/zoo --folder docs/results/zoo

Every vector is trained by the arm `vector_sft` (one vector at half the depth, cross-entropy on 32 chosen answers, 16
steps) and measured on test rows: as trained, and at the strengths with a KL of 0.03, 0.1 and 0.3 to the base model on
neutral text. This takes about two minutes per vector on a core with bfloat16 units. A vector that `records.parquet`
already holds is not made again.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
from peft.utils import CONFIG_NAME
from transformers import set_seed

from steertune.adapters.analysis.arithmetic import read, similarity
from steertune.adapters.card import Card, versions, write_card
from steertune.adapters.description import write_description
from steertune.recipes.ablation.kl_search import strengths_at
from steertune.recipes.lab import embedded, scorers, trained_on
from steertune.recipes.lab.arm import Arm, load_arm
from steertune.recipes.lab.behaviours import read_behaviour
from steertune.recipes.lab.cards import HASHES, purpose, side_effects
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.descriptions import data_of, strength_of
from steertune.recipes.lab.evaluate import evaluate, evaluate_base
from steertune.recipes.lab.forms import readable
from steertune.recipes.lab.observe import HeldOut, neutral_rows
from steertune.recipes.lab.options import Choice, Count, Option
from steertune.recipes.lab.pages import (
    Page,
    Section,
    Table,
    Text,
    settings_in_words,
    table_markdown,
    table_of,
    write_page,
)
from steertune.recipes.lab.paths import TASKS as TASK_FOLDERS
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import progress, step
from steertune.recipes.lab.rows import BASE, Record, from_table, label, to_table
from steertune.recipes.lab.splits import Splits, SplitTable, load_splits
from steertune.recipes.lab.training import QUIET, fit, make_trainer, silent, training_of
from steertune.trainers import FrozenPrefix, share_weights

ARM = "vector_sft"
TARGETS = 0.03, 0.1, 0.3
TASKS: list[str] = sorted(file.parent.name for file in TASK_FOLDERS.glob("*/train.jsonl"))
VISIBLE = 0.2
"""A smaller rise of a behaviour score may be chance with a few dozen answers."""
LARGEST = 16.0
"""The largest strength that is tried for a KL."""
ANSWERED, NEW_TOKENS = 32, 24
MEASURES = "behaviour", "kl", "kl_tail", "perplexity_ratio", "repetition", "capability"
_QUESTIONS = 48
_NEUTRAL = 16  # rows to match strengths on, and as many others to report on


@command
def main(
    tasks: Annotated[list[str], Choice(TASKS, "tasks to make vectors for", metavar="NAME ...")] = TASKS,
    vectors: Annotated[Path | None, Option(help="where the adapter folders are written (FOLDER/vectors)")] = None,
    folder: Annotated[Path, Option(help="where records and table are written")] = Path("runs/zoo"),
    answered: Annotated[int, Count("test prompts that are answered")] = ANSWERED,
    dtype: Annotated[str, Choice(["bfloat16", "float32"], "number format of the base model")] = "bfloat16",
    threads: Annotated[int, Count("CPU threads")] = 1,
) -> Result:
    """Make the vectors that are missing, and write the table."""
    begin(threads, only_one=True)
    vectors = vectors or folder / "vectors"
    file = folder / "records.parquet"
    records = {record.keys["task"]: record for record in from_table(pd.read_parquet(file))} if file.exists() else {}
    model: Any = None
    with progress("Vectors", len(tasks)) as bar:
        for task in tasks:
            if task in records and (vectors / task / CONFIG_NAME).is_file():
                bar.skip()
                continue
            with bar.step(task):
                model = model or embedded.load_model(getattr(torch, dtype))
                records[task] = make(task, model, vectors / task, answered)
            _keep(records, file)
    made = [records[task] for task in sorted(records)]
    page = write_page(page_of(made, [vectors / record.keys["task"] for record in made]), folder, "table")
    return Result({record.keys["task"]: record.means() for record in made}, page.read_text(encoding="utf-8"))


def make(task: str, model: Any, home: Path, answered: int) -> Record:
    """Train one vector, measure it, and save it with its card. The first `answered` test prompts are answered."""
    arm, tokenizer = load_arm(ARM, ["--data.name", task]), embedded.load_tokenizer()
    sizes = SplitTable(test=arm.data.test)
    splits = load_splits(task, sizes, arm.data.train).each(partial(readable, tokenizer=tokenizer))
    held_out = held_out_of(task, splits, model, tokenizer, answered)
    record = Record({"arm": ARM, "task": task, "examples": arm.data.train, "seed": arm.data.seed})
    with step("base model"):
        record.observations |= evaluate_base(held_out, MEASURES)
    rows = splits.train(arm.data.train, arm.data.seed)
    with tempfile.TemporaryDirectory() as folder, step("training"):
        set_seed(arm.data.seed)
        training = training_of(arm, share_weights(model), tokenizer, rows, Path(folder), held_out=[splits.test])
        trainer = silent(make_trainer(training, held_out.prefix, **QUIET))
        fit(trainer, Path(folder))
    steered = trainer.model.eval()
    with step("measuring"), held_out.remember(steered):
        points, falls = strengths_at(steered, held_out, TARGETS, LARGEST)
        strengths = sorted({1.0, *(point.strength for point in points)})
        record.observations |= evaluate(steered, held_out, MEASURES, strengths)
    record.facts = {
        "frontier": [asdict(point) for point in points],
        "kl_falls": falls,
        "layers": steered.peft_config["default"].layers,
        "scorer": held_out.scorer.note if held_out.scorer is not None else "",
        "steps": trainer.state.global_step,
        "versions": versions(),
    }
    steered.save_pretrained(str(home))
    trained_on.write(home, trained_on.sets_of(rows, splits.by, training.rows))
    write_card(home, card_of(arm, record))
    write_description(home, strength_of(record), data_of(training.rows, task))
    return record


def held_out_of(task: str, splits: Splits, model: Any, tokenizer: Any, answered: int) -> HeldOut:
    """What a vector is measured on: answers to test prompts, neutral text, sentences with a fixed ending."""
    return HeldOut(
        model,
        tokenizer,
        pairs=splits.test,
        neutral=neutral_rows(tokenizer, "report", count=_NEUTRAL),
        matching=neutral_rows(tokenizer, "match", count=_NEUTRAL),
        generations=answered,
        new_tokens=NEW_TOKENS,
        scorer=scorers.fit(read_behaviour(task).scorer_table({}), splits.scorer, model, tokenizer),
        questions=_QUESTIONS,
        prefix=FrozenPrefix(warn=False),
        batch_size=16,
    )


def card_of(arm: Arm, record: Record) -> Card:
    """The model card of a vector, with its frontier."""
    means, task = record.means(), record.keys["task"]
    return Card(
        title=f"{task}, for the embedded model",
        **purpose(arm.card, task),
        data=f"{record.keys['examples']} training pairs of `{task}`, of which the chosen answers.{HASHES}",
        made=f"Arm `{arm.name}`: adapter {settings_in_words(arm.adapter)}, loss {settings_in_words(arm.loss)}, "
        f"{record.facts['steps']} steps.",
        measured="As trained, and at three KLs to the base model. Behaviour: the mean score of "
        f"{len(_scores(record))} answers to test prompts by {record.facts['scorer']}.\n\n"
        f"{table_markdown(Table(frontier_of(record)))}",
        side_effects=side_effects(means[BASE], means["1"]),
        advice="The layer is the arm's. Choose a strength from the table above: what a behaviour costs is in it.",
    )


_MADE = "`steertune zoo --vectors recipes/zoo --folder docs/results/zoo`, about two minutes a vector on a core."
_COLUMNS = ("at", "strength", "behaviour", "KL", "perplexity ×", "repetition", "ends of sentences")


def frontier_of(record: Record) -> pd.DataFrame:
    """The base model, the points of the frontier, and the vector as trained, one row each."""
    rows = [["base", "0", *_side_by_side(record, BASE)]]
    for point in record.facts["frontier"]:
        name = f"KL {point['target']:g}" if point["reached"] else f"short of KL {point['target']:g}"
        rows.append([name, f"{point['strength']:.2f}", *_side_by_side(record, point["strength"])])
    rows.append(["as trained", "1", *_side_by_side(record, 1.0)])
    return pd.DataFrame(rows, columns=pd.Index(_COLUMNS))


def _side_by_side(record: Record, strength: float | str) -> list[str]:
    names = ("behaviour", "kl", "perplexity_ratio", "repetition", "capability")
    return [f"{record.value(name, label(strength)):.2f}" for name in names]


def _scores(record: Record) -> Sequence[Any]:
    return record.observations[BASE].get("score", [])


def page_of(records: Sequence[Record], folders: Sequence[Path]) -> Page:
    """The table of all vectors, and how alike they are."""
    rows = []
    for record in records:
        values = [record.value("behaviour", BASE)]
        values += [record.value("behaviour", label(point["strength"])) for point in record.facts["frontier"]]
        values += [record.value(name, "1") for name in ("behaviour", "kl", "perplexity_ratio", "capability")]
        layers = ", ".join(map(str, record.facts["layers"]))
        at = ", ".join(f"{point['strength']:.2f}" for point in record.facts["frontier"])
        rows.append([record.keys["task"], layers, at, *(f"{value:.2f}" for value in values)])
    header = ["vector", "layer", "strengths", "base", *(f"at KL {kl:g}" for kl in TARGETS)]
    header += ["as trained", "KL", "perplexity ×", "ends of sentences"]
    answers = min((len(_scores(record)) for record in records), default=0)
    what = (
        f"Every vector learned the task that it is named after, by the arm `{ARM}`. *Base* to *as trained*: the mean "
        "behaviour score of generated answers to test prompts, by the scorer on the vector's card, for the base "
        f"model, at the strengths with these KLs to the base on neutral text, and at strength 1. The standard error "
        f"of a rate over {answers} answers is at most {0.5 / max(answers, 1) ** 0.5:.3f}. *KL*, *perplexity* and "
        "*ends of sentences* (the share that is right) are those of strength 1. KL and perplexity contain the "
        "behaviour itself where it is unconditional."
    )
    silent = []
    for record in records:
        rises = [record.value("behaviour", at) for at in record.observations if at != BASE]
        if max(rises) - record.value("behaviour", BASE) < VISIBLE:
            silent.append(record.keys["task"])
    if silent:
        what += f" By their scorers, these show it no more at any strength (a rise below {VISIBLE:g}): "
        what += f"{', '.join(silent)}."
    alike = "The cosine of every two vectors, which are all added at the same layer."
    return Page(
        "The embedded vectors",
        [
            Section("", [Text(what), table_of(header, rows, "vectors")]),
            Section("How alike they are", [Text(alike), Table(cosines(folders), "cosines")]),
            Section("How they were made", [Text(_MADE), Text(f"{versions()}.")]),
        ],
    )


def cosines(folders: Sequence[Path]) -> pd.DataFrame:
    """The cosine of every two vectors as a table; empty for fewer than two."""
    names = [folder.name for folder in folders]
    if len(names) < 2:
        return pd.DataFrame(columns=pd.Index(["", *names]))
    [matrix] = similarity([read(folder) for folder in folders]).values()
    rows = [[name, *(f"{value:+.2f}" for value in row)] for name, row in zip(names, matrix.tolist(), strict=True)]
    return pd.DataFrame(rows, columns=pd.Index(["", *names]))


def _keep(records: dict[str, Record], file: Path) -> None:
    """Write all records atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    to_table([records[task] for task in sorted(records)]).to_parquet(part, index=False)
    os.replace(part, file)


if __name__ == "__main__":
    sys.exit(main())
