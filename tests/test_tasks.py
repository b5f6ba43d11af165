"""The embedded tasks: their format, and that no test prompt was seen in training, not even nearly."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from pathlib import Path

import pytest

from steertune.recipes.arm import NEUTRAL
from steertune.recipes.embedded import TASKS, task_names
from steertune.recipes.measures import neutral_rows

SPLITS = {"train": 128, "validation": 40, "test": 80}


def rows(task: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (TASKS / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def words(text: str) -> list[str]:
    return re.sub(r"[^\w\s]", "", text.lower()).split()


def near(first: str, second: str) -> bool:
    """Whether two prompts are near-duplicates: shared words, or the same letters in the same order."""
    a, b = set(words(first)), set(words(second))
    if len(a & b) / len(a | b) >= 0.6:
        return True
    matcher = difflib.SequenceMatcher(None, " ".join(words(first)), " ".join(words(second)))
    return matcher.real_quick_ratio() >= 0.8 and matcher.quick_ratio() >= 0.8 and matcher.ratio() >= 0.8


def test_there_are_two_tasks() -> None:
    assert len(task_names()) >= 2


@pytest.mark.parametrize("task", task_names())
def test_format_and_sizes(task: str) -> None:
    answers = []
    for split, least in SPLITS.items():
        found = rows(task, split)
        assert len(found) >= least
        for row in found:
            assert set(row) == {"prompt", "chosen", "rejected"}
            assert [m["role"] for m in (*row["prompt"], *row["chosen"], *row["rejected"])] == ["user"] + 2 * [
                "assistant"
            ]
            answers += [row["chosen"][0]["content"], row["rejected"][0]["content"]]
    assert len(set(answers)) == len(answers), "an answer stands twice"
    assert (TASKS / task / "README.md").is_file()


@pytest.mark.parametrize("task", task_names())
def test_no_near_duplicates_within_or_across_splits(task: str) -> None:
    prompts = [(split, row["prompt"][0]["content"]) for split in SPLITS for row in rows(task, split)]
    pairs = itertools.combinations(prompts, 2)
    assert [pair for pair in pairs if near(pair[0][1], pair[1][1])] == []


def test_the_check_for_near_duplicates_finds_one() -> None:
    assert near("What is a good first motorcycle?", "What's a good first motorcycle")
    assert not near("What is a good first motorcycle?", "We might adopt a second child.")


def test_what_neutral_training_shows_is_not_what_side_effects_are_measured_on() -> None:
    measured, shown = (
        [str(json.loads(line)["prompt"][-1]["content"]) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in (NEUTRAL.with_name("neutral.jsonl"), NEUTRAL)
    )
    assert len(measured) > 8 < len(shown) and not [pair for pair in itertools.product(shown, measured) if near(*pair)]


def test_neutral_rows_are_demonstrations() -> None:
    assert set(neutral_rows().column_names) == {"prompt", "completion"}


def test_results_name_no_machine() -> None:
    for file in Path(TASKS).parent.rglob("*.md"):
        assert "/work/" not in file.read_text(encoding="utf-8")
