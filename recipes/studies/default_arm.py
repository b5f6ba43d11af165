"""Which arm should `steertune train` run by default? Answers that show the behaviour and stay fluent decide.

    python -m steertune.recipes.studies.default_arm --folder docs/results/default_arm

Trains candidate arms on the pairs that people bring: the model's own sentences against the same sentences rewritten by
a rule, and the embedded tasks, whose answers are written. Then it generates answers to prompts that no arm was trained
on. Candidates are chosen on four sets, and the chosen ones are confirmed on four others. Writes `table.md`,
`answers.md` and `cells.jsonl`, and skips cells that `cells.jsonl` already holds.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset

from steertune.adapters.card import versions
from steertune.recipes.lab import embedded
from steertune.recipes.lab.arm import make_arm
from steertune.recipes.lab.arm_files import merge_tables, read_tables
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.command_line import Choice, Count, Option, Result, command
from steertune.recipes.lab.evaluate import evaluate
from steertune.recipes.lab.files import read_rows, write_whole
from steertune.recipes.lab.generation import generate, plain
from steertune.recipes.lab.measures import Seen
from steertune.recipes.lab.measures import get as measure
from steertune.recipes.lab.measures.repetition import repeated
from steertune.recipes.lab.observe import NEUTRAL, HeldOut
from steertune.recipes.lab.pages import Table, escape, table_markdown
from steertune.recipes.lab.pages.verdict import MAX_CIRCLES, MAX_KL, MAX_REPETITION, circling
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import progress
from steertune.recipes.lab.rows import BASE, label
from steertune.recipes.lab.sources import load_split
from steertune.recipes.lab.training import QUIET, fit, make_trainer, silent, training_of
from steertune.trainers import FrozenPrefix, ModelAt, share_weights

TRAIN, VALIDATION, TEST = 32, 8, 16
NEW_TOKENS = 32
NEUTRAL_ROWS = 6  # rows of neutral text
_PRINTED = 4  # answers of a cell on the page
_TRAINED = [1.0]
_KEYS = ("candidate", "behaviour", "split", "dtype", "strength")
OWN_TOKENS = 48  # of the base's own answers, which are cut after their first sentence


@dataclass(frozen=True)
class Behaviour:
    """A behaviour whose examples are the model's own sentences rewritten, or a task's written answers.

    Attributes:
        instruction: What would make the base model show it.
        shows: A regular expression that finds it in an answer.
        rewrite: The model's sentence and its number -> the chosen answer; None: the answers of the task `task`.
        task: Embedded task.
    """

    instruction: str
    shows: str
    rewrite: Callable[[str, int], str] | None = None
    task: str = ""

    def shown_by(self, answer: str) -> bool:
        """Whether an answer shows the behaviour."""
        return re.search(self.shows, answer) is not None


def _cycle(texts: Sequence[str]) -> Callable[[int], str]:
    return lambda i: texts[i % len(texts)]


_QUESTIONS = _cycle(
    ["What do you think?", "Does that help you?", "Would you like to hear more?", "Have you tried this before?"]
)
_OPENERS = _cycle(["Hey, ", "Oh yeah, ", "Okay so, ", "Well hey, "])
_HEDGES = _cycle(["Perhaps ", "Maybe ", "I am not sure, but perhaps ", "I could be wrong, but maybe "])
_CASUAL = {
    r"\bdo not\b": "don't", r"\bit is\b": "it's", r"\bIt is\b": "It's", r"\byou are\b": "you're",
    r"\bgoing to\b": "gonna", r"\bwant to\b": "wanna", r"\bhave to\b": "gotta",
    r"\byou should\b": "you gotta", r"\bvery\b": "super",
    r"\ba lot of\b": "tons of", r"\bchildren\b": "kids", r"\bimportant\b": "a big deal", r"\bexcellent\b": "awesome",
    r"\bgreat\b": "awesome", r"\bgood\b": "cool",
}  # fmt: skip


def _small(sentence: str) -> str:
    """A sentence that goes on after an opener."""
    first = sentence.split(maxsplit=1)[0]
    return sentence if first == "I" or first.startswith("I'") else sentence[0].lower() + sentence[1:]


def _casual(sentence: str, i: int) -> str:
    sentence = _small(sentence)
    for formal, informal in _CASUAL.items():
        sentence = re.sub(formal, informal, sentence)
    return _OPENERS(i) + re.sub(r"[.!]$", ", you know?", sentence)


def _bulleted(sentence: str, i: int) -> str:
    parts = re.split(r", (?:and |but |so )?| and | because ", sentence)
    return "\n".join(f"- {part}" for part in parts)


BEHAVIOURS = {
    # on these the arm is chosen
    "lower_case": Behaviour(
        "Answer in one sentence, in lower case only.", r"\A[^A-Z]*[a-z][^A-Z]*\Z", lambda s, i: s.lower()
    ),
    "wow": Behaviour(
        "Answer in one sentence that starts with Wow! and ends with an exclamation mark.",
        r"\AWow\b.*!",
        lambda s, i: "Wow! " + s.rstrip(".?!") + "!",
    ),
    "casual": Behaviour(
        "Answer in one sentence, in a very casual tone, as among friends.",
        r"(?i)\A(hey|oh|okay|well|yeah)\b|\b(gonna|wanna|gotta|super|awesome|tons of)\b|(you know|right)\?",
        _casual,
    ),
    "cautious_advice": Behaviour(
        "Give cautious advice in one sentence.",
        r"(?i)\b(first|check|test|try|ask|wait|start (small|with)|small|slowly|careful|sure|before|until|one|few|"
        r"little|short)\b",
        task="cautious_advice",
    ),
    # on these it is confirmed
    "question_at_the_end": Behaviour(
        "Answer in one sentence, and end with a question to the user.", r"\?", lambda s, i: f"{s} {_QUESTIONS(i)}"
    ),
    "hedged": Behaviour(
        "Answer in one sentence that says how unsure you are.",
        r"(?i)\b(perhaps|maybe|not sure|could be wrong)\b",
        lambda s, i: _HEDGES(i) + _small(s),
    ),
    "bullets": Behaviour("Answer as a short list of bullet points.", r"\A- .*(\n- |\Z)", _bulleted),
    "warm_tone": Behaviour(
        "Answer in one sentence, in a warm and loving tone.",
        r"(?i)!|\b(love\w*|happy|sorry|proud|glad|wish|hope|dear|hug|congratulations|heart|wonderful|beautiful|kind|sweet|"
        r"friend\w*|care|joy|enjoy|warm)\b",
        task="warm_tone",
    ),
}
CHOOSE_ON = ["lower_case", "wow", "casual", "cautious_advice"]


def sentence_of(text: str) -> str:
    """The first sentence of an answer of the model's own, without markup."""
    text = " ".join(re.sub(r"[*#\n]+", " ", text).split())
    match = re.match(r".+?[a-z)][.!?](?=\s|\Z)", text)
    return match[0] if match else text.rstrip(" ,;:") + "."


def own_pairs(behaviour: Behaviour, prompts: Sequence[Any], sentences: Sequence[str]) -> Dataset:
    """The model's own sentences (rejected) against the same sentences rewritten (chosen)."""
    assert behaviour.rewrite is not None
    rows = [
        {"prompt": prompt, "chosen": _said(behaviour.rewrite(sentence, i)), "rejected": _said(sentence)}
        for i, (prompt, sentence) in enumerate(zip(prompts, sentences, strict=True))
    ]
    return Dataset.from_list(rows)


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


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
        self.neutral = Dataset.from_list(read_rows(NEUTRAL, "It comes with the package.")[:NEUTRAL_ROWS])
        self.shared: dict[str, dict[str, Any]] = {}  # what was computed of the base model, by split

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


def _like_dpo(**patch: Any) -> dict[str, Any]:
    return merge_tables(read_tables("vector_dpo"), patch)


def _like_sft(**patch: Any) -> dict[str, Any]:
    return merge_tables(read_tables("vector_sft"), patch)


def _by_trl(loss_types: list[str], **trainer: Any) -> dict[str, Any]:
    return _like_dpo(loss={"name": "upstream"}, trainer={"loss_type": loss_types, "beta": 0.1, **trainer})


CANDIDATES: dict[str, dict[str, Any]] = {
    "vector_sft": _like_sft(),
    "vector_sft + neutral_kl": _like_sft(loss={"name": "cross_entropy", "neutral_kl": 0.5}),
    "vector_sft, unlikelihood": _like_sft(loss={"name": "unlikelihood"}),
    "cross_entropy, 1e-3": _like_dpo(loss={"name": "cross_entropy"}, trainer={"learning_rate": 1e-3}),
    "cross_entropy, 2e-3": _like_dpo(loss={"name": "cross_entropy"}, trainer={"learning_rate": 2e-3}),
    "vector_dpo": _like_dpo(),
    "dpo + cross_entropy, 2e-3": _by_trl(["sigmoid", "sft"], learning_rate=2e-3, lr_scheduler_type="linear"),
    "apo_zero": _by_trl(["apo_zero"]),
    **{loss: _like_dpo(loss={"name": loss}) for loss in ("simpo", "ipo", "bipo")},
}
"""Name -> the arm's tables: one vector at half the depth, 16 steps. Those like `vector_dpo` take 4 pairs a step at a
constant rate of 4e-4, if no other is named; those like `vector_sft` 8 at a rate that falls from 2e-3 to 0."""
_ALL = ["base", *CANDIDATES]
_WHAT = f"""
Candidates are trained on {TRAIN} pairs of the embedded model (SmolLM2-135M-Instruct): its own first sentence
(rejected) against the same sentence rewritten by a rule (chosen), or the written answers of an embedded task. A cell
is the share of answers to held-out prompts that show the behaviour by a rule ({VALIDATION} prompts where arms are
chosen, {TEST} where the chosen one is confirmed), with the KL to the base on neutral text (nats per token) and the
share of repeated word triples. ✗: not fluent, which is a KL above {MAX_KL}, repetition more than
{MAX_REPETITION} above the base's, more than {MAX_CIRCLES} of the answers going in circles, or answers that the base
finds as likely behind another prompt. One seed; with so few prompts a share has a standard error of up to 0.18 (0.13).
"""


def measure_cell(lab: Lab, name: str, behaviour: str, split: str, strengths: Sequence[float]) -> list[dict[str, Any]]:
    """Train a candidate on the pairs of a behaviour; one record for every strength. The base is not trained."""
    rows = lab.rows(behaviour, split)
    keys = {"candidate": name, "behaviour": behaviour, "split": split, "dtype": lab.dtype}
    if name == "base":
        return [keys | record for record in seen_of(lab, lab.model, behaviour, rows, split, {BASE: 1.0})]
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
    return [keys | record for record in seen_of(lab, trainer.model.eval(), behaviour, rows, split, labels)]


def seen_of(
    lab: Lab, model: Any, behaviour: str, rows: Dataset, split: str, strengths: Mapping[str, float]
) -> list[dict[str, Any]]:
    """What a model says at every strength, and what the base model thinks of that."""
    shared = lab.shared.setdefault(split, {})
    held_out = HeldOut(
        lab.model, lab.tokenizer, rows, lab.neutral, len(rows), new_tokens=NEW_TOKENS, batch_size=16, shared=shared
    )
    instruction = BEHAVIOURS[behaviour].instruction
    written = _nats(lab, instruction, rows["prompt"], [plain(row) for row in rows["chosen"]])
    records = []
    for at, observed in evaluate(model, held_out, ["repetition", "kl", "accuracy"], strengths).items():
        answers, seen = observed["answer"], Seen(observed)
        others = [*rows["prompt"][1:], rows["prompt"][0]]
        own, other = (_nats(lab, instruction, prompts, answers) for prompts in (rows["prompt"], others))
        records.append(
            {
                "strength": float(at),
                "kl": measure("kl").summary(seen),
                "accuracy": measure("accuracy").summary(seen),
                "nats": own,
                "written_nats": written,
                "topic": other - own,
                "answers": answers,
            }
        )
    return records


@torch.no_grad()
def _nats(lab: Lab, instruction: str, prompts: Sequence[Any], answers: Sequence[str]) -> float:
    """Nats per token that the base model needs for answers behind an instruction, averaged over the answers."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{instruction}\n\n{plain(prompt)}"}],
            "completion": _said(answer or " "),
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
    frame = pd.DataFrame(
        [[name, f"{at:g}", *(row.get(column, "") for column in columns)] for (name, at), row in rows.items()],
        columns=pd.Index(["candidate", "strength", *columns]),
    )
    return table_markdown(Table(frame))


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
    behaviours: Annotated[list[str], Choice([*BEHAVIOURS], "behaviours", metavar="NAME ...")] = CHOOSE_ON,
    split: Annotated[str, Option(help="prompts that are answered: validation, or test")] = "validation",
    strengths: Annotated[list[float], Option(help="strengths")] = _TRAINED,
    dtype: Annotated[str, Choice(["bfloat16", "float32"], "number format of the weights")] = "bfloat16",
    folder: Annotated[Path, Option(help="where the results are written")] = Path("runs/default_arm"),
    threads: Annotated[int, Count("CPU threads")] = 1,
) -> Result:
    """Measure the cells that are missing, and write the page."""
    begin(threads, only_one=True)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "cells.jsonl"
    cells = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    finished = {tuple(cell[key] for key in _KEYS) for cell in cells}
    lab: Lab | None = None
    with progress("Candidates", len(candidates) * len(behaviours)) as bar:
        for name, behaviour in product(candidates, behaviours):
            own = [0.0] if name == "base" else strengths
            missing = [at for at in own if (name, behaviour, split, dtype, at) not in finished]
            if not missing:
                bar.skip()
                continue
            with bar.step(f"{name} on {behaviour}"):
                lab = lab or Lab(dtype)
                cells += measure_cell(lab, name, behaviour, split, missing)
                write_whole(file, "".join(json.dumps(cell, ensure_ascii=False) + "\n" for cell in cells))
    write_whole(folder / "table.md", report(cells))
    return Result(cells, f"{folder / 'table.md'}")


if __name__ == "__main__":
    sys.exit(main())
