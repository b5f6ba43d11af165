"""One file is divided by a hash of the prompt: the same for everybody, stable, and without near-duplicates across."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from unlike_pairs import NOUNS, pair, unlike, write

from steertune.recipes.lab.data import load_data
from steertune.recipes.lab.division import Division, divide
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.similarity import Frame, shingles, text_of, told_apart_by, words
from steertune.recipes.lab.splits import SplitTable, load_splits
from steertune.recipes.lab.tables import DataTable


def part_of(division: Division) -> dict[int, str]:
    parts = {"train": division.train, "held out": division.held_out, "left out": division.left_out}
    return {i: name for name, part in parts.items() for i in part}


def test_no_row_stands_in_both_parts_and_none_is_lost():
    division = divide(unlike(100), "prompt")
    assert sorted(division.train + division.held_out) == [*range(100)] and division.left_out == []
    assert 8 <= len(division.held_out) <= 35  # 20 are expected, with a standard deviation of 4


@pytest.mark.parametrize("count", [1, 5, 12, 15])
def test_too_few_rows_have_no_test_part(count, tmp_path):
    data = load_data(DataTable(name=write(tmp_path / "few.jsonl", unlike(count))))
    assert len(data.train) == count and len(data.test) == 0
    assert f"one file of {count} rows, too few to hold any out: 16" in data.note


@pytest.mark.parametrize("count", [16, 20, 30])
def test_the_test_part_has_eight_rows_at_least(count):
    division = divide(unlike(count), "prompt")
    assert len(division.held_out) == 8 and len(division.train) == count - 8


def test_rows_added_behind_move_no_others():
    rows = unlike(100)
    added = [
        *unlike(5, start=100),
        *(pair(f"{row['prompt']}!") for row in rows[::3]),
        pair(f"{rows[0]['prompt']} {rows[1]['prompt']}"),
    ]
    before = part_of(divide(rows, "prompt"))
    for count in range(0, len(added) + 1, 7):
        after = part_of(divide(rows + added[:count], "prompt"))
        assert {i: after[i] for i in before} == before


def test_near_duplicates_share_a_part_and_a_row_that_resembles_both_is_left_out():
    rows = [pair(f"how do I tell my {noun} that {other} needs another week") for noun, other in zip(
        NOUNS[:60], NOUNS[60:120], strict=True)]  # fmt: skip
    near = [pair(row["prompt"].upper() + ", please?") for row in rows]
    parts = part_of(divide(rows + near, "prompt"))
    assert all(parts[i] == parts[60 + i] for i in range(60)), "case, punctuation and one more word"


def test_a_row_that_resembles_both_parts_is_left_out_and_said(tmp_path):
    rows = unlike(60)
    # eight words of which any two rows share five at most; one added row shares seven with each of two of them
    chains = [NOUNS[120 + i : 130 + i] for i in range(0, 60, 5)]
    rows += [pair(" ".join(chain)) for chain in chains]
    parts = part_of(divide(rows, "prompt"))
    i = next(i for i in range(60, 71) if {parts[i], parts[i + 1]} == {"train", "held out"})
    between = NOUNS[122 + 5 * (i - 60) : 132 + 5 * (i - 60)]
    division = divide([*rows, pair(" ".join(between))], "prompt", near=0.35)
    assert division.left_out == [72]
    assert {i: part for i, part in part_of(division).items() if i < 72} == parts
    assert "1 rows that resemble rows of both parts are left out" in division.note("x", "prompt")


def test_numbers_make_prompts_different_and_a_common_frame_does_not_make_them_alike():
    assert divide([pair(f"What is the answer to question number {i}?") for i in range(50)], "prompt").held_out
    frame = "Is the following statement something you would say about yourself and your work? I like"
    division = divide([pair(f"{frame} {row['prompt']}") for row in unlike(50)], "prompt")
    assert len(division.held_out) >= 8
    texts = [words(f"{frame} {noun}. Answer.") for noun in NOUNS[:20]]
    assert Frame.of(texts).rest(texts[3]) == {f"|{NOUNS[3]}", f"|like {NOUNS[3]}", f"|{NOUNS[3]} answer"}
    assert Frame.of(texts).rest(words("anything else")) == shingles(words("anything else"))


def test_prompts_that_are_all_the_same_are_told_apart_by_their_answers():
    rows = [{"prompt": "Write a line.", "chosen": row["prompt"], "rejected": "no"} for row in unlike(40)]
    assert told_apart_by(rows) == "text" and told_apart_by(unlike(3)) == "prompt"
    assert divide(rows, told_apart_by(rows)).held_out


def test_the_division_is_the_same_in_another_process(tmp_path):
    file = write(tmp_path / "pairs.jsonl", unlike(60))
    code = (
        "import json, sys; from steertune.recipes.lab.division import divide; "
        "print(divide([json.loads(line) for line in open(sys.argv[1])], 'prompt').held_out)"
    )
    seeds = [
        subprocess.run(
            [sys.executable, "-c", code, file],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    assert seeds[0] == seeds[1] == str(divide(unlike(60), "prompt").held_out)


def test_every_recipe_has_the_same_test_rows(tmp_path):
    name = write(tmp_path / "pairs.jsonl", unlike(60))
    trained = [load_data(DataTable(name=name, seed=seed)) for seed in (0, 1)]
    splits = load_splits(name, SplitTable(), 8)
    assert trained[0].test.to_list() == trained[1].test.to_list() == splits.test.to_list()
    prompts = {
        part: set(map(text_of, getattr(splits, part)["prompt"])) for part in ("pool", "validation", "scorer", "test")
    }
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values())) == 60
    assert len(prompts["validation"]) >= 8 <= len(prompts["scorer"])
    assert not set(map(text_of, trained[0].train["prompt"])) & prompts["test"]
    assert "60 rows, divided by a hash of the prompt" in splits.note


def test_a_single_file_in_a_folder_is_divided_and_too_few_rows_for_a_sweep_are_refused(tmp_path):
    write(tmp_path / "train.jsonl", unlike(40))
    assert len(load_data(DataTable(name=str(tmp_path))).test) >= 8
    with pytest.raises(ArmError, match=r"20 rows, .* Test, validation rows are needed besides: 8 each"):
        load_splits(write(tmp_path / "x.jsonl", unlike(20)), SplitTable(scorer=0), 1)


def test_rows_of_two_files_that_ask_nearly_the_same_are_refused_or_dropped(tmp_path):
    write(tmp_path / "train.jsonl", unlike(20))
    write(tmp_path / "test.jsonl", [*unlike(5, 30), pair(unlike(20)[7]["prompt"].upper() + "?")])
    table = DataTable(name=str(tmp_path), train=20, test=6)
    with pytest.raises(ArmError, match=r"test\.jsonl:6, a held-out row, .* training row .*train\.jsonl:8"):
        load_data(table)
    dropped = load_data(table.model_copy(update={"train": 19, "drop_near_duplicates": True}))
    assert len(dropped.train) == 19 and "1 training rows that resemble test rows are left out" in dropped.note
