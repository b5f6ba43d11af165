"""Make the rows of the generated tasks: `python recipes/tasks/make.py [TASK ...]`, by default of all tasks.

A generated task is a folder with a `rule.py`, whose `pairs(example, draw)` proposes a chosen and a rejected answer to
a prompt. The prompts come from `prompts.toml`, and the material of both answers from `answers.jsonl`: the embedded
model's own answers. `python recipes/tasks/make.py --answers` makes that file again (ten minutes on one core).

Rows are deterministic. Every topic and every frame of a prompt belongs to one part of a task, so that no test prompt
resembles a training prompt, and both answers of a pair have the same number of tokens, so that length gives no clue.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import runpy
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer

from steertune.recipes.lab import embedded
from steertune.recipes.lab.files import write_whole
from steertune.recipes.lab.generation import generate

HERE = Path(__file__).parent
ANSWERS = HERE / "answers.jsonl"
ROWS = {"train": 172, "validation": 48, "test": 208}
"""Rows of each part; the scorer of a grid takes 40 of the training rows."""
TOPICS = {"train": 146, "validation": 62, "test": 236}
_PROMPTS_A_TOPIC = 2  # of each kind, neutral and personal
_NEW_TOKENS = 30
_BATCH = 64
_SHORTEST = 6  # words of an answer
_NEAR = 0.8  # similarity, by `alike`, from which on rows of two parts are too close
_DRAWS = 40  # versions of a pair that are tried to give both answers the same number of tokens


@dataclass(frozen=True)
class Example:
    """A prompt, and the material for an answer to it.

    Attributes:
        part: `train`, `validation` or `test`.
        kind: `neutral`, `personal` (the prompt asks for an opinion), `claim` (it states one), `plan`, or `news`.
        topic: Its topic, such as `bicycles`.
        prompt: The prompt.
        answer: The first sentence of the embedded model's answer, for neutral prompts.
        fact: A sentence about the topic without its full stop, from the model's answer to a neutral prompt. "" if the
            answer is about the model itself or asks something.
    """

    part: str
    kind: str
    topic: str
    prompt: str
    answer: str = ""
    fact: str = ""

    def behind(self, phrase: str) -> str:
        """A sentence that consists of a phrase and the fact."""
        return f"{phrase} {self.fact[0].lower()}{self.fact[1:]}."


Rule = Callable[[Example, random.Random], tuple[str, str] | None]
"""Makes a chosen and a rejected answer from an example; None if the example does not suit the task."""


def prompts() -> list[Example]:
    """Every prompt, without an answer."""
    tables = tomllib.loads((HERE / "prompts.toml").read_text(encoding="utf-8"))
    topics = [word.strip() for words in tables["topics"].values() for word in words.split(",")]
    random.Random(0).shuffle(topics)
    examples, start = [], 0
    for part, count in TOPICS.items():
        for number, topic in enumerate(topics[start : start + count]):
            for kind, frames in tables["frames"][part].items():
                for turn in range(_PROMPTS_A_TOPIC):
                    frame = frames[(number + turn * (len(frames) // 2)) % len(frames)]
                    examples.append(Example(part, kind, topic, frame.format(x=topic)))
        start += count
    return examples


def answer_all() -> None:
    """Write `answers.jsonl`: the first sentence of the embedded model's greedy answers, if it is complete."""
    model, tokenizer = embedded.load_model(), embedded.load_tokenizer()
    texts = sorted((example.prompt for example in prompts() if example.kind == "neutral"), key=len)  # little padding
    lines = []
    for i in range(0, len(texts), _BATCH):
        chats = [[{"role": "user", "content": text}] for text in texts[i : i + _BATCH]]
        for text, answer in zip(texts[i : i + _BATCH], generate(model, tokenizer, chats, _NEW_TOKENS), strict=True):
            if sentence := re.match(r"(.*?[.!?])(?=\s|$)", answer.replace("\n", " ")):
                lines.append(json.dumps({"prompt": text, "answer": sentence[1]}, ensure_ascii=False) + "\n")
        print(f"{min(i + _BATCH, len(texts))} of {len(texts)} prompts answered", file=sys.stderr)
    write_whole(ANSWERS, "".join(lines))


def examples() -> list[Example]:
    """Every prompt with its answer and a fact."""
    rows = map(json.loads, ANSWERS.read_text(encoding="utf-8").splitlines())
    answers = {row["prompt"]: row["answer"] for row in rows if len(row["answer"].split()) >= _SHORTEST}
    answered, facts = [], {}
    for example in prompts():
        answer = answers.get(example.prompt, "")
        # some answers repeat the prompt, and some are about something else
        if answer == example.prompt or example.topic[:4].lower() not in answer.lower():
            answer = ""
        if example.kind == "neutral" and answer and not re.search(r"\b(I|I'm|my|me|we|our|you|your)\b|\?", answer):
            facts.setdefault(example.topic, []).append(answer.rstrip(".!"))
        if answer or example.kind != "neutral":
            answered.append(replace(example, answer=answer))
    turns: Counter[tuple[str, str]] = Counter()
    for place, example in enumerate(answered):
        of_topic = facts.get(example.topic, [])
        if of_topic:  # the second prompt of a kind gets another fact than the first, if there are two
            answered[place] = replace(example, fact=of_topic[turns[example.topic, example.kind] % len(of_topic)])
        turns[example.topic, example.kind] += 1
    return answered


def make(name: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of a task, by part."""
    rule, tokenizer, everything = rule_of(name), embedded.load_tokenizer(), examples()
    parts: dict[str, list[dict[str, Any]]] = {}
    taken: list[str] = []  # texts of the parts made so far
    for part in ("test", "validation", "train"):  # training rows make way for test rows that they resemble
        of_part = [example for example in everything if example.part == part]
        made = [(example.topic, row) for example in of_part if (row := balanced(name, example, rule, tokenizer))]
        random.Random(f"{name} {part}").shuffle(made)
        # a row of every topic comes before the second row of any
        turns: Counter[str] = Counter()
        ranked = []
        for topic, row in made:
            ranked.append((turns[topic], row))
            turns[topic] += 1
        rows = [row for _, row in sorted(ranked, key=lambda pair: pair[0])]
        texts = [text for row in rows for text in texts_of(row)]
        near = {i // 2 for i, _ in alike(texts, taken, _NEAR)}
        # of two rows of this part that resemble each other, the first one stays
        near |= {j // 2 for i, j in alike(texts, texts, _NEAR) if i // 2 < j // 2}
        rows = [row for i, row in enumerate(rows) if i not in near][: ROWS[part]]
        random.Random(f"{part} {name}").shuffle(rows)
        taken += [text for row in rows for text in texts_of(row)]
        parts[part] = rows
    return parts


def alike(first: Sequence[str], second: Sequence[str], threshold: float) -> list[tuple[int, int]]:
    """Pairs (index in first, index in second) whose TF-IDF vectors over words and word pairs have a cosine of at least
    `threshold`. The committed rows were chosen by it; recipes compare rows as `lab/similarity.py` does."""
    if not first or not second:
        return []
    vectors = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\S+", sublinear_tf=True)
    vectors.fit([*first, *second])
    similarity = (vectors.transform(first) @ vectors.transform(second).T).tocoo()
    near = similarity.data >= threshold - 1e-9
    return sorted(zip(similarity.row[near].tolist(), similarity.col[near].tolist(), strict=True))


def texts_of(row: dict[str, Any]) -> list[str]:
    """Prompt and chosen answer of a pair, and prompt and rejected answer, as plain text."""
    prompt = json.dumps(row["prompt"], sort_keys=True)
    return [f"{prompt} {json.dumps(row[side], sort_keys=True)}" for side in ("chosen", "rejected")]


def balanced(name: str, example: Example, rule: Rule, tokenizer: Any) -> dict[str, Any] | None:
    """A pair whose answers have the same number of tokens, as a row; None if no draw gives one."""
    draw = random.Random(f"{name} {example.prompt}")
    for _ in range(_DRAWS):
        answers = rule(example, draw)
        if answers is None:
            return None
        if len({len(tokenizer(answer)["input_ids"]) for answer in answers}) == 1:
            texts = {"prompt": ("user", example.prompt), "chosen": ("assistant", answers[0])}
            texts |= {"rejected": ("assistant", answers[1])}
            return {key: [{"role": role, "content": text}] for key, (role, text) in texts.items()}
    return None


def rule_of(name: str) -> Rule:
    """The function `pairs` of a task's `rule.py`."""
    return runpy.run_path(str(HERE / name / "rule.py"))["pairs"]


def main() -> int:
    """Run the command line; return the exit code."""
    names = sorted(file.parent.name for file in HERE.glob("*/rule.py"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", help=f"any of {names}; all of them if none is given")
    parser.add_argument("--answers", action="store_true", help="generate the answers of the embedded model again")
    options = parser.parse_args()
    if unknown := sorted({*options.tasks} - {*names}):
        parser.error(f"no task with a rule: {unknown}. Choose from {names}.")
    if options.answers:
        answer_all()
        return 0
    for name in options.tasks or names:
        parts = make(name)
        for part, rows in parts.items():
            if len(rows) < ROWS[part]:
                parser.error(f"{name}: its rule gives {len(rows)} rows for {part}, {ROWS[part]} are needed.")
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_whole(HERE / name / f"{part}.jsonl", "".join(lines))
        print(f"{name}: {', '.join(f'{len(rows)} {part} rows' for part, rows in parts.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
