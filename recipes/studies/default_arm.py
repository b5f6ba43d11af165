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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from datasets import Dataset

from steertune.recipes.lab import embedded
from steertune.recipes.lab.arm import Arm, make_arm
from steertune.recipes.lab.arm_files import merge_tables, read_tables
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.command_line import Choice, Count, Option, Result, command
from steertune.recipes.lab.data import load_split
from steertune.recipes.lab.evaluate import evaluate
from steertune.recipes.lab.files import write_whole
from steertune.recipes.lab.generation import generate, plain
from steertune.recipes.lab.measures import Seen
from steertune.recipes.lab.measures import get as measure
from steertune.recipes.lab.observe import HeldOut, neutral_rows
from steertune.recipes.lab.processes import begin
from steertune.recipes.lab.progress import progress
from steertune.recipes.lab.training import QUIET, fit, make_trainer, silent, training_of
from steertune.trainers import FrozenPrefix, ModelAt, share_weights

TRAIN, VALIDATION, TEST = 32, 8, 16
NEW_TOKENS = 32
NEUTRAL = 8  # rows of neutral text
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
    r"\bdo not\b": "don't", r"\bit is\b": "it's", r"\bIt is\b": "It's", r"\byou are\b": "you're", r"\bgoing to\b": "gonna",
    r"\bwant to\b": "wanna", r"\bhave to\b": "gotta", r"\byou should\b": "you gotta", r"\bvery\b": "super",
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
        r"(?i)\b(hey|yeah|okay so|gonna|wanna|gotta|super|awesome|tons of|you know\?)",
        _casual,
    ),
    "cautious_advice": Behaviour(
        "Give cautious advice in one sentence.",
        r"(?i)\b(first|check|test|try|ask|wait|start (small|with)|small|slowly|careful|sure|before|until|one|few|little|short)\b",
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

    def __init__(self) -> None:
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
        self.neutral = neutral_rows().select(range(NEUTRAL))
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


def _rated(rate: float, loss: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"loss": loss, "trainer": {"learning_rate": rate}, **more}


def _upstream(rate: float, *types: str) -> dict[str, Any]:
    trainer = {"learning_rate": rate, "loss_type": [*types], "beta": 0.1}
    return {"loss": {"name": "upstream"}, "trainer": trainer}


CANDIDATES: dict[str, dict[str, Any]] = {
    "dpo 4e-4": {},  # vector_dpo as it is
    "cross_entropy 4e-4": _rated(4e-4, {"name": "cross_entropy"}),
    "cross_entropy 1e-3": _rated(1e-3, {"name": "cross_entropy"}),
    "cross_entropy 2e-3": _rated(2e-3, {"name": "cross_entropy"}),
    "cross_entropy + neutral_kl 1e-3": _rated(
        1e-3, {"name": "cross_entropy", "neutral_kl": 0.5}, views={"neutral": {}}
    ),
    "dpo + cross_entropy 1e-3": _upstream(1e-3, "sigmoid", "sft"),
    "unlikelihood 1e-3": _rated(1e-3, {"name": "unlikelihood"}),
    "apo_zero 4e-4": _upstream(4e-4, "apo_zero"),
    "simpo 4e-4": _rated(4e-4, {"name": "simpo"}),
    "ipo 4e-4": _rated(4e-4, {"name": "ipo"}),
    "bipo 4e-4": _rated(4e-4, {"name": "bipo"}),
    "dpo 2e-4": _rated(2e-4, {"name": "dpo", "beta": 0.1}),
}
"""Name -> what it changes of the arm `vector_dpo`: one vector at half the depth, 16 steps of 4 pairs."""


def candidate(name: str) -> Arm:
    """The arm of a candidate."""
    return make_arm(merge_tables(read_tables("vector_dpo"), CANDIDATES[name]))


def measure_cell(lab: Lab, name: str, behaviour: str, split: str, strengths: Sequence[float]) -> list[dict[str, Any]]:
    """Train a candidate on the pairs of a behaviour; one record for every strength."""
    rows = lab.rows(behaviour, split)
    with tempfile.TemporaryDirectory() as home:
        training = training_of(
            candidate(name), share_weights(lab.model), lab.tokenizer, lab.rows(behaviour, "train"), Path(home)
        )
        trainer = silent(make_trainer(training, lab.prefix, **QUIET))
        seconds = fit(trainer, Path(home))
    keys = {"candidate": name, "behaviour": behaviour, "split": split, "seconds": round(seconds, 1)}
    return [keys | record for record in seen_of(lab, trainer.model.eval(), behaviour, rows, split, strengths)]


def seen_of(
    lab: Lab, model: Any, behaviour: str, rows: Dataset, split: str, strengths: Sequence[float]
) -> list[dict[str, Any]]:
    """What a model says at every strength, and what the base model thinks of that."""
    shared = lab.shared.setdefault(split, {})
    held_out = HeldOut(
        lab.model, lab.tokenizer, rows, lab.neutral, len(rows), new_tokens=NEW_TOKENS, batch_size=16, shared=shared
    )
    instruction = BEHAVIOURS[behaviour].instruction
    written = _nats(lab, instruction, rows["prompt"], [plain(row) for row in rows["chosen"]])
    records = []
    for label, observed in evaluate(model, held_out, ["repetition", "kl", "accuracy"], strengths).items():
        answers, seen = observed["answer"], Seen(observed)
        others = [*rows["prompt"][1:], rows["prompt"][0]]
        own, other = (_nats(lab, instruction, prompts, answers) for prompts in (rows["prompt"], others))
        records.append(
            {
                "strength": float(label),
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


@command
def main(
    candidates: Annotated[list[str], Choice([*CANDIDATES], "candidates", metavar="NAME ...")] = [*CANDIDATES],  # noqa: B006
    behaviours: Annotated[list[str], Choice([*BEHAVIOURS], "behaviours", metavar="NAME ...")] = CHOOSE_ON,
    split: Annotated[str, Option(help="prompts that are answered")] = "validation",
    strengths: Annotated[list[float], Option(help="strengths")] = [1.0],  # noqa: B006
    folder: Annotated[Path, Option(help="where the results are written")] = Path("runs/default_arm"),
    threads: Annotated[int, Count("CPU threads")] = 1,
) -> Result:
    """Measure the cells that are missing, and write the tables."""
    begin(threads, only_one=True)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "cells.jsonl"
    cells = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    finished = {(cell["candidate"], cell["behaviour"], cell["split"], cell["strength"]) for cell in cells}
    lab: Lab | None = None
    with progress("Candidates", len(candidates) * len(behaviours)) as bar:
        for name, behaviour in product(candidates, behaviours):
            missing = [s for s in strengths if (name, behaviour, split, s) not in finished]
            if not missing:
                bar.skip()
                continue
            with bar.step(f"{name} on {behaviour}"):
                lab = lab or Lab()
                cells += measure_cell(lab, name, behaviour, split, missing)
                write_whole(file, "".join(json.dumps(cell) + "\n" for cell in cells))
    return Result(cells, "")


if __name__ == "__main__":
    sys.exit(main())
