"""Every embedded task passes the same checks: sizes, lengths, no overlap, a card, and a scorer that is right."""

from __future__ import annotations

import difflib
import json
import re
import runpy
from itertools import combinations
from pathlib import Path

import pytest

from steertune.recipes.ablation.grid import find_tasks
from steertune.recipes.ablation.tables import TaskTable
from steertune.recipes.lab import embedded, scorers
from steertune.recipes.lab.behaviours import Behaviour, read_behaviour
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.generation import plain
from steertune.recipes.lab.paths import TASKS
from steertune.recipes.lab.sources import load_split
from steertune.recipes.lab.splits import SplitTable, load_splits

PARTS = ("train", "validation", "test")
GENERATED = sorted(file.parent.name for file in TASKS.glob("*/rule.py"))
LEAST = {"train": 128, "validation": 40, "test": 200}
CARD = ("How it was made", "Resolution", "Scorer", "Measured", "Cannot tell", "Licence")


def answers(name: str, part: str, side: str) -> list[str]:
    return [plain(row) for row in load_split(name, part)[side]]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def test_there_are_enough_tasks() -> None:
    assert len(GENERATED) >= 8 and set(GENERATED) < set(embedded.task_names())


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", GENERATED)
def test_sizes(name: str) -> None:
    for part, least in LEAST.items():
        rows = load_split(name, part)
        assert len(rows) >= least and set(rows.column_names) == {"prompt", "chosen", "rejected"}
    splits = load_splits(name, SplitTable(validation=40, test=200, scorer=40), 128)
    assert len(splits.pool) >= 128


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", GENERATED)
def test_no_part_shares_a_prompt_or_nearly_one(name: str) -> None:
    prompts = {part: [plain(prompt) for prompt in load_split(name, part)["prompt"]] for part in PARTS}
    for one, other in combinations(PARTS, 2):
        for first in prompts[one]:
            for second in prompts[other]:
                a, b = words(first), words(second)
                if len(a & b) >= 0.6 * len(a | b):
                    raise AssertionError(f"{one} and {other}: {first!r} and {second!r}")
                # the ratio is at most this, and takes long to compute
                matcher = difflib.SequenceMatcher(None, first.lower(), second.lower(), autojunk=False)
                assert matcher.quick_ratio() < 0.9 or matcher.ratio() < 0.8, (first, second)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", GENERATED)
def test_the_answers_of_a_pair_differ_and_have_as_many_tokens(name: str) -> None:
    tokenizer = embedded.load_tokenizer()
    for part in PARTS:
        chosen, rejected = answers(name, part, "chosen"), answers(name, part, "rejected")
        assert all(a != b for a, b in zip(chosen, rejected, strict=True))
        lengths = [[len(ids) for ids in tokenizer(texts)["input_ids"]] for texts in (chosen, rejected)]
        assert lengths[0] == lengths[1]
        # characters may differ, most where long words are what the task is about
        characters = [len(a) / len(b) for a, b in zip(chosen, rejected, strict=True)]
        assert 0.5 < sum(characters) / len(characters) < 1.5


@pytest.mark.parametrize("name", GENERATED)
def test_the_rule_tells_chosen_from_rejected_answers(name: str) -> None:
    scorer = scorers.fit(read_behaviour(name).scorer_table({}), load_split(name, "validation"), None, None)
    for part in PARTS:
        for side, expected in (("chosen", 1.0), ("rejected", 0.0)):
            texts = answers(name, part, side)
            wrong = [t for t, s in zip(texts, scorer.score([""] * len(texts), texts), strict=True) if s != expected]
            assert len(wrong) <= 0.02 * len(texts), wrong[:3]


@pytest.mark.parametrize("name", GENERATED)
def test_what_can_be_undone_is_undone(name: str) -> None:
    behaviour = read_behaviour(name)
    if behaviour.undo is None:
        return
    scorer = scorers.fit(behaviour.scorer_table({}), load_split(name, "validation"), None, None)
    chosen = answers(name, "test", "chosen")
    undone = [behaviour.undo.apply(text) for text in chosen]
    assert all(text.strip() for text in undone)
    scores = scorer.score([""] * len(undone), undone)
    assert sum(score or 0 for score in scores) <= 0.1 * len(scores)


@pytest.mark.parametrize("name", embedded.task_names())
def test_every_task_has_a_card_and_instructions(name: str) -> None:
    card = (TASKS / name / "README.md").read_text(encoding="utf-8")
    assert embedded.about(name) and "Apache-2.0" in card
    behaviour = read_behaviour(name)
    assert behaviour.opposites is not None
    if name in GENERATED:
        assert [title for title in CARD if f"## {title}" not in card] == []
        assert f"python recipes/tasks/make.py {name}" in card
        assert behaviour.opposites.positive in card and behaviour.opposites.negative in card


@pytest.mark.thinned(3)
@pytest.mark.real
@pytest.mark.parametrize("name", GENERATED)
def test_the_rows_are_those_of_the_generator(name: str) -> None:
    make = runpy.run_path(str(TASKS / "make.py"))["make"]
    for part, rows in make(name).items():
        lines = (TASKS / name / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows, part


# -- behaviour.toml ---------------------------------------------------------------------------------------------------


def test_a_grid_takes_the_scorer_of_the_task() -> None:
    hedged = TaskTable(name="hedged", scorer={"kind": "logprob"})
    named = find_tasks(["lower_case", hedged, "cautious_advice"])
    assert [task.scorer["kind"] for task in named] == ["rule", "logprob", "classifier"]
    assert named[1].scorer["positive"].startswith("Answer with doubt")
    for table in named:
        scorers.read(table.scorer)


def test_swapped_answers_have_no_scorer_of_the_task() -> None:
    [task] = find_tasks([TaskTable(name="lower_case", reverse=True)])
    assert task.scorer == {"kind": "classifier"}


def test_a_scorer_table_is_completed_and_never_overruled() -> None:
    own = Behaviour.model_validate({"scorer": {"kind": "rule", "pattern": "a"}})
    assert own.scorer_table({}) == own.scorer_table({"kind": "rule"}) == {"kind": "rule", "pattern": "a"}
    assert own.scorer_table({"kind": "rule", "pattern": "b"})["pattern"] == "b"
    assert own.scorer_table({"kind": "logprob"}) == {"kind": "logprob"}
    assert Behaviour().scorer_table({}) == {"kind": "classifier"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[scorre]\nkind = 'rule'", "scorre"),
        ("[undo]\npattern = '('", "not a regular expression"),
        ("[opposites]\npositive = 'a'", "negative"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "behaviour.toml").write_text(text)
    with pytest.raises(ArmError, match=rf"behaviour\.toml.*{message}"):
        read_behaviour(str(tmp_path))


def test_undoing_by_hand() -> None:
    undo = Behaviour.model_validate({"undo": {"pattern": r"(?<=[.!])[^.!?]*\?\W*\Z"}}).undo
    assert undo is not None and undo.apply("It is. Is IT?") == "It is." and undo.apply("It is.") == "It is."
