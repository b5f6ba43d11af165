"""Which arm should `steertune train` run by default? The one whose answers show the behaviour and stay fluent.

    python -m steertune.recipes.studies.default_arm --folder docs/results/default_arm

Trains candidate arms on the pairs that people bring: the model's own sentences against the same sentences rewritten by
a rule, and the embedded tasks, whose answers are written. Then it generates answers to prompts that no arm was trained
on. Candidates are chosen on four sets, and the chosen ones are confirmed on four others. Writes `table.md`
and `cells.json`, and skips cells that `cells.json` already holds:

    ... --behaviours question_at_the_end hedged bullets warm_tone --split test --candidates base vector_sft
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from steertune.adapters.card import versions
from steertune.recipes.lab import embedded
from steertune.recipes.lab.arm import make_arm
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.command_line import Result, command
from steertune.recipes.lab.evaluate import evaluate
from steertune.recipes.lab.files import read_jsonl, write_whole
from steertune.recipes.lab.generation import generate, plain
from steertune.recipes.lab.measures import Seen
from steertune.recipes.lab.measures import get as measure
from steertune.recipes.lab.measures.repetition import repeated
from steertune.recipes.lab.observe import NEUTRAL, HeldOut
from steertune.recipes.lab.options import Choice, Count, Option
from steertune.recipes.lab.pages import escape, table_markdown, table_of
from steertune.recipes.lab.pages.verdict import MAX_CIRCLES, MAX_KL, MAX_REPETITION, circling
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.resumable import Job, Key, records_of
from steertune.recipes.lab.rows import BASE, label
from steertune.recipes.lab.sources import load_split
from steertune.recipes.lab.training import QUIET, fit, make_trainer, silent, training_of
from steertune.recipes.studies.natural.behaviours import BEHAVIOURS, own_pairs, said, sentence_of
from steertune.recipes.studies.natural.candidates import CANDIDATES
from steertune.trainers import FrozenPrefix, ModelAt, share_weights

TRAIN, VALIDATION, TEST = 32, 8, 16
NEW_TOKENS = 32
NEUTRAL_ROWS = 6  # rows of neutral text
_PRINTED = 4  # answers of a cell on the page
_TRAINED = [1.0]
_ALL = [
    "base", "vector_sft", "vector_sft + neutral_kl", "vector_sft by unlikelihood", "cross_entropy 1e-3",
    "cross_entropy 2e-3", "vector_dpo", "dpo + cross_entropy 2e-3", "apo_zero", "simpo", "ipo", "bipo",
]  # fmt: skip
CHOOSE_ON = ["lower_case", "wow", "casual", "cautious_advice"]
CONFIRM_ON = ["question_at_the_end", "hedged", "bullets", "warm_tone"]
_SETS = [*CHOOSE_ON, *CONFIRM_ON]
_KEYS = ("candidate", "behaviour", "split", "dtype", "strength")
OWN_TOKENS = 48  # of the base's own answers, which are cut after their first sentence


class Lab:
    """The model, its own sentences, and the examples of every behaviour."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.model, self.tokenizer = embedded.load_model(), embedded.load_tokenizer()
        self.prefix = FrozenPrefix(warn=False)
        sizes = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
        self.prompts = {split: self._prompts(split, size) for split, size in sizes.items()}
        self.sentences = {
            split: [
                sentence_of(text)
                for i in range(0, len(prompts), 16)
                for text in generate(self.model, self.tokenizer, prompts[i : i + 16], OWN_TOKENS)
            ]
            for split, prompts in self.prompts.items()
        }
        self.model.to(getattr(torch, dtype))  # the sentences are the same in both
        self.neutral = Dataset.from_list(read_jsonl(NEUTRAL)[:NEUTRAL_ROWS])
        self.neutral_logps: dict[str, list[Tensor]] = {}  # of the base model

    @staticmethod
    def _prompts(split: str, size: int) -> list[Any]:
        """Prompts of both embedded tasks in turn."""
        both = [load_split(task, split)["prompt"][: size // 2] for task in ("cautious_advice", "warm_tone")]
        return [prompt for pair in zip(*both, strict=True) for prompt in pair]

    def rows(self, name: str, split: str) -> Dataset:
        """The pairs of a behaviour."""
        behaviour = BEHAVIOURS[name]
        if behaviour.rewrite is None:
            rows = load_split(behaviour.task, split)
            return rows.select(range({"train": TRAIN, "validation": VALIDATION, "test": TEST}[split]))
        return own_pairs(behaviour, self.prompts[split], self.sentences[split])


_WHAT = f"""
Candidates are trained on {TRAIN} pairs of the embedded model (SmolLM2-135M-Instruct): its own first sentence
(rejected) against the same sentence rewritten by a rule (chosen), or the written answers of an embedded task. A cell
is the share of answers to held-out prompts that show the behaviour by a rule ({VALIDATION} prompts where arms are
chosen, {TEST} where the chosen one is confirmed), with the KL to the base on neutral text (nats per token) and the
share of repeated word triples. ✗: not fluent, which is a KL above {MAX_KL}, repetition more than
{MAX_REPETITION} above the base's, more than {MAX_CIRCLES} of the answers going in circles, or answers that the base
finds as likely behind another prompt.

What this does not say: one seed, one small model, and few prompts, so a share has a standard error of up to 0.18
(0.13). Empty cells were not measured. The rule for `casual` was widened after reading its first answers ("Oh, that's a
fun story, right?"). `dpo + cross_entropy` took six times as long as `vector_sft`, and two of its eight answers go in
circles of hyphens that no limit counts.
"""


def measure_cell(lab: Lab, name: str, behaviour: str, split: str, strengths: Sequence[float]) -> list[dict[str, Any]]:
    """Train a candidate on the pairs of a behaviour; one record for every strength. The base is not trained."""
    rows = lab.rows(behaviour, split)
    keys = {"candidate": name, "behaviour": behaviour, "split": split, "dtype": lab.dtype}
    if name == "base":
        return [keys | record for record in seen_of(lab, lab.model, behaviour, rows, {BASE: 1.0})]
    with tempfile.TemporaryDirectory() as home:
        training = training_of(
            make_arm(CANDIDATES[name]),
            share_weights(lab.model),
            lab.tokenizer,
            lab.rows(behaviour, "train"),
            Path(home),
        )
        trainer = silent(make_trainer(training, lab.prefix, **QUIET))
        fit(trainer, Path(home))
    labels = {label(strength): strength for strength in strengths}
    return [keys | record for record in seen_of(lab, trainer.model.eval(), behaviour, rows, labels)]


def seen_of(
    lab: Lab, model: Any, behaviour: str, rows: Dataset, strengths: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A model's answers at every strength, and how likely the base model finds them after the instruction."""
    held_out = HeldOut(
        lab.model,
        lab.tokenizer,
        rows,
        lab.neutral,
        len(rows),
        new_tokens=NEW_TOKENS,
        batch_size=16,
        neutral_logps=lab.neutral_logps,
    )
    instruction = BEHAVIOURS[behaviour].instruction
    written = _nats(lab, instruction, rows["prompt"], [plain(row) for row in rows["chosen"]])
    records = []
    for at, observed in evaluate(model, held_out, ["repetition", "kl", "accuracy"], strengths).items():
        answers, seen = observed["answer"], Seen(observed)
        others = [*rows["prompt"][1:], rows["prompt"][0]]
        nats, other = (_nats(lab, instruction, prompts, answers) for prompts in (rows["prompt"], others))
        records.append(
            {
                "strength": float(at),
                "kl": measure("kl").summary(seen),
                "accuracy": measure("accuracy").summary(seen),
                "nats": nats,
                "written_nats": written,
                "topic": other - nats,
                "answers": answers,
            }
        )
    return records


@torch.no_grad()
def _nats(lab: Lab, instruction: str, prompts: Sequence[Any], answers: Sequence[str]) -> float:
    """Nats per token that the base model needs for answers after an instruction, averaged over the answers."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{instruction}\n\n{plain(prompt)}"}],
            "completion": said(answer or " "),
        }
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    values: list[float] = []
    for batch in batches(lab.tokenizer, Dataset.from_list(rows), 16):
        values += ModelAt(lab.model, lab.model, batch)(1.0).mean_logps.tolist()
    return -float(np.mean(values))


def shown(cell: Mapping[str, Any]) -> float:
    """Share of a cell's answers that show its behaviour."""
    return float(np.mean([BEHAVIOURS[cell["behaviour"]].shown_by(answer) for answer in cell["answers"]]))


def repeats(cell: Mapping[str, Any]) -> float:
    """Mean repetition of a cell's answers."""
    return float(np.nan_to_num(np.nanmean([repeated(answer) for answer in cell["answers"]])))


def is_fluent(cell: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Whether a cell is within the limits of a training's page, and its answers are about their prompts."""
    return (
        cell["kl"] <= MAX_KL
        and repeats(cell) <= repeats(base) + MAX_REPETITION
        and circling(cell["answers"]) <= circling(base["answers"]) + MAX_CIRCLES
        and cell["topic"] > 0
    )


def table(cells: Sequence[Mapping[str, Any]], split: str) -> str:
    """One row for every candidate and strength, one column for every behaviour."""
    bases = {cell["behaviour"]: cell for cell in cells if cell["candidate"] == "base" and cell["split"] == split}
    rows: dict[tuple[str, float], dict[str, str]] = {}
    for cell in (cell for cell in cells if cell["split"] == split):
        base = bases[cell["behaviour"]]
        fluent = "" if is_fluent(cell, base) else " ✗"
        text = f"{shown(cell):.2f} (KL {cell['kl']:.2f}, repetition {repeats(cell):.2f}){fluent}"
        rows.setdefault((cell["candidate"], cell["strength"]), {})[cell["behaviour"]] = text
    columns = [name for name in BEHAVIOURS if name in bases]
    cells_of = [[name, f"{at:g}", *(row.get(column, "") for column in columns)] for (name, at), row in rows.items()]
    return table_markdown(table_of(["candidate", "strength", *columns], cells_of))


def report(cells: Sequence[Mapping[str, Any]]) -> str:
    """The whole page."""
    lines = ["# Which arm is the default", "", _WHAT.strip(), "", "## Chosen on", "", table(cells, "validation")]
    lines += ["", "## Confirmed on", "", table(cells, "test"), "", "## Answers", ""]
    for cell in cells:
        if cell["candidate"] in ("base", "vector_dpo", "vector_sft") and cell["strength"] in (0.0, 1.0):
            lines += [f"**{cell['candidate']}, {cell['behaviour']}**", ""]
            lines += [*(f"- {escape(answer)}" for answer in cell["answers"][:_PRINTED]), ""]
    return "\n".join(lines) + f"\nMade by `python -m steertune.recipes.studies.default_arm` with {versions()}.\n"


@command
def main(
    candidates: Annotated[list[str], Choice(_ALL, "candidates", metavar="NAME ...")] = _ALL,
    behaviours: Annotated[list[str], Choice(_SETS, "behaviours", metavar="NAME ...")] = CHOOSE_ON,
    split: Annotated[str, Option(help="prompts that are answered: validation, or test")] = "validation",
    strengths: Annotated[list[float], Option(help="strengths")] = _TRAINED,
    dtype: Annotated[str, Choice(["bfloat16", "float32"], "number format of the weights")] = "bfloat16",
    folder: Annotated[Path, Option(help="where the results are written")] = Path("runs/default_arm"),
    threads: Annotated[int, Count("CPU threads")] = 1,
) -> Result:
    """Measure the cells that are missing, and write the page."""
    begin(threads, only_one=True)
    lab = cache(partial(Lab, dtype))  # made only if a cell is missing

    def job(name: str, behaviour: str) -> Job:
        def run(missing: Sequence[Key]) -> list[dict[str, Any]]:
            return measure_cell(lab(), name, behaviour, split, [at for *_, at in missing])

        keys = [(name, behaviour, split, dtype, at) for at in ([0.0] if name == "base" else strengths)]
        return Job(f"{name} on {behaviour}", keys, run)

    jobs = [job(name, behaviour) for name, behaviour in product(candidates, behaviours)]
    cells = records_of(jobs, folder / "cells.json", _KEYS, "Candidates")
    write_whole(folder / "table.md", report(cells))
    return Result(cells, f"{folder / 'table.md'}")


if __name__ == "__main__":
    sys.exit(main())
