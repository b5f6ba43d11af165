"""Splits share no row, training sets are nested and the same for every arm; and what tuning may cost."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from steertune.recipes.ablation.budget import BudgetTable, Setting, draw, untrained_strengths
from steertune.recipes.lab.embedded import task_names
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.sources import Reading
from steertune.recipes.lab.splits import Splits, SplitTable, load_splits

datasets.disable_progress_bars()

Row = dict[str, str]
SIZES = {"validation": 3, "scorer": 4, "test": 3}
LONG = " ".join(f"word{i}" for i in range(60))


def row(name: str, prompt: str = "") -> Row:
    """A pair that shares no word with another name's, but for what `prompt` adds."""
    return {"prompt": f"{name} {prompt}".strip(), "chosen": f" good-{name}", "rejected": f"bad-{name}"}


def rows(name: str, count: int) -> list[Row]:
    return [row(f"{name}{i}") for i in range(count)]


def task(folder: Path, **files: Sequence[dict[str, Any]]) -> str:
    """A folder with one file a split. Training rows are laid down so that the split's own shuffle puts them back in
    the given order: validation rows (without a file of their own), scorer rows, then the pool."""
    folder.mkdir()
    for split, given in files.items():
        laid = list(given)
        if split == "train":
            for place, i in enumerate(Dataset.from_dict({"i": range(len(given))}).shuffle(seed=0)["i"]):
                laid[i] = given[place]
        Dataset.from_list(laid).to_json(folder / f"{split}.jsonl")
    return str(folder)


def split(name: str, largest: int = 1, reverse: bool = False, **sizes) -> Splits:
    return load_splits(name, SplitTable(**{**SIZES, **sizes}), largest, reverse)


def prompts(splits: Splits) -> dict[str, list[str]]:
    return {part: list(getattr(splits, part)["prompt"]) for part in ("pool", "validation", "scorer", "test")}


def drawn(count: int = 16) -> Splits:
    """Splits with a pool to draw from."""
    pool, none = Dataset.from_list(rows("p", count)), Dataset.from_list(rows("n", 1))
    return Splits(pool, none, none, none)


# -- training sets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_training_sets_are_nested_and_differ_by_seed(seed):
    splits = drawn()
    few, more, every = (splits.train(n, seed).to_list() for n in (4, 8, 16))
    assert few == more[:4] and more == every[:8]
    assert sorted(r["prompt"] for r in every) == sorted(splits.pool["prompt"])
    assert splits.train(16, seed).to_list() == every  # asked again, as every arm does
    assert splits.train(16, seed + 1).to_list() != every
    other_few, other = (splits.train(n, seed, draw=1).to_list() for n in (4, 16))
    assert other != every and other_few == other[:4] and splits.train(16, seed, draw=0).to_list() == every


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [2, 3, 8])
def test_shuffled_pairs_give_every_prompt_the_rejected_answer_of_another(seed, count):
    splits = drawn()
    own, shuffled = (splits.train(count, seed, pairing).to_list() for pairing in ("own", "shuffled"))
    for side in ("prompt", "chosen"):
        assert [r[side] for r in own] == [r[side] for r in shuffled]
    assert sorted(r["rejected"] for r in own) == sorted(r["rejected"] for r in shuffled)
    assert all(a["rejected"] != b["rejected"] for a, b in zip(own, shuffled, strict=True))


def test_pairs_that_cannot_be_shuffled_are_refused():
    with pytest.raises(ArmError, match="at least 2 examples .got 1."):
        drawn().train(1, 0, "shuffled")
    bare = Dataset.from_list([{"chosen": f"a {i}", "rejected": f"b {i}"} for i in range(4)])
    with pytest.raises(ArmError, match=r"columns prompt and rejected.*\['chosen', 'rejected'\]"):
        Splits(bare, bare, bare, bare).train(4, 0, "shuffled")


# -- splits -----------------------------------------------------------------------------------------------------------


def test_validation_and_scorer_rows_come_from_train_where_there_is_no_file(tmp_path):
    train = rows("a", 12)
    splits = split(task(tmp_path / "t", train=train, test=rows("t", 5)), largest=5)
    expected = [r["prompt"] for r in train]
    assert prompts(splits) == {
        "validation": expected[:3], "scorer": expected[3:7], "pool": expected[7:], "test": ["t0", "t1", "t2"],
    }  # fmt: skip


def test_validation_rows_come_from_their_own_file_where_there_is_one(tmp_path):
    train = rows("a", 12)
    splits = split(task(tmp_path / "t", train=train, validation=rows("v", 5), test=rows("t", 3)), largest=8)
    expected = [r["prompt"] for r in train]
    assert prompts(splits) == {
        "validation": ["v0", "v1", "v2"], "scorer": expected[:4], "pool": expected[4:], "test": ["t0", "t1", "t2"],
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_no_row_stands_in_two_splits(seed, tmp_path):
    number = random.Random(seed)
    sizes = {"validation": number.randint(2, 9), "scorer": number.randint(0, 9), "test": number.randint(2, 9)}
    name = task(tmp_path / "t", train=rows("a", 30), test=rows("t", 9))
    found = prompts(split(name, **sizes))
    together = list(itertools.chain(*found.values()))
    assert len(together) == len(set(together)) == 30 + sizes["test"]
    assert {part: len(found[part]) for part in sizes} == sizes
    assert found == prompts(split(name, **sizes))


def test_reverse_swaps_the_answers_of_every_split(tmp_path):
    name = task(tmp_path / "t", train=rows("a", 12), test=rows("t", 3))
    plain, swapped = split(name), split(name, reverse=True)
    for part in ("pool", "validation", "scorer", "test"):
        before, after = getattr(plain, part).to_list(), getattr(swapped, part).to_list()
        assert before, part
        assert after == [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in before]
    first, second = (s.train(4, 0, "shuffled").to_list() for s in (plain, swapped))
    # the answers that move are the rejected ones, whichever these are
    assert [r["chosen"] for r in second] == [f"bad-{r['prompt']}" for r in first]


@pytest.mark.parametrize("name", task_names())
def test_embedded_tasks_can_be_split(name):
    splits = load_splits(name, SplitTable(), 32)
    assert (len(splits.validation), len(splits.scorer), len(splits.test)) == (24, 40, 40)
    shuffled, own = (splits.train(8, 0, pairing).to_list() for pairing in ("shuffled", "own"))
    assert [r["prompt"] for r in shuffled] == [r["prompt"] for r in own]
    assert all(a["rejected"] != b["rejected"] for a, b in zip(own, shuffled, strict=True))


# -- duplicates -------------------------------------------------------------------------------------------------------

# (first split, second split) -> place in the file of each: train holds scorer rows, then the pool
PLACES = {"train": ("train", 6), "scorer": ("train", 1), "validation": ("validation", 1), "test": ("test", 2)}
APART = [("train", "test"), ("train", "validation"), ("validation", "test"), ("scorer", "test")]


def doubled(folder: Path, first: str, second: str, near: bool) -> str:
    """A task whose splits share one row, exactly or but for one word of sixty."""
    files = {"train": rows("a", 12), "validation": rows("v", 3), "test": rows("t", 3)}
    for name, start in ((first, "FIRST" if near else "BOTH"), (second, "SECOND" if near else "BOTH")):
        file, place = PLACES[name]
        files[file][place] = {"prompt": f"{start} {LONG}", "chosen": " yes", "rejected": f"no, says {name}"}
    return task(folder, **files)


@pytest.mark.parametrize("near", [False, True], ids=["exact", "near"])
@pytest.mark.parametrize(("first", "second"), APART, ids=["-".join(pair) for pair in APART])
def test_a_row_of_two_splits_is_refused_and_both_are_named(first, second, near, tmp_path):
    name = doubled(tmp_path / "t", first, second, near)
    with pytest.raises(ArmError) as caught:
        split(name)
    message = str(caught.value)
    assert f"a {first} row and a {second} row ask the same or nearly the same: " in message
    shown = ["FIRST word0 word1", "SECOND word0 word1"] if near else ["BOTH word0 word1"] * 2
    assert all(message.count(text) == shown.count(text) for text in shown), message
    assert ("splits.drop_near_duplicates = true" in message) is (first == "train")
    if near:  # at a threshold of 1 only the same words in the same order count
        split(name, near_duplicates=1.0)


@pytest.mark.parametrize("near", [False, True], ids=["exact", "near"])
@pytest.mark.parametrize(("first", "second"), APART, ids=["-".join(pair) for pair in APART])
def test_dropping_near_duplicates_drops_training_rows_only(first, second, near, tmp_path):
    name = doubled(tmp_path / "t", first, second, near)
    if first != "train":  # what is measured must stay what it is
        with pytest.raises(ArmError, match=f"a {first} row and a {second} row"):
            split(name, drop_near_duplicates=True)
        return
    found = prompts(split(name, largest=7, drop_near_duplicates=True))
    assert found["pool"] == ["a4", "a5", "a7", "a8", "a9", "a10", "a11"]
    assert [len(found[part]) for part in ("validation", "scorer", "test")] == [3, 4, 3]
    assert any(LONG in prompt for prompt in found[second])
    with pytest.raises(ArmError, match="8 training examples requested, 7 are left"):
        split(name, largest=8, drop_near_duplicates=True)


@pytest.mark.parametrize(
    ("seen", "measured"), [("rejected", "rejected"), ("rejected", "chosen"), ("chosen", "rejected")]
)
def test_an_answer_to_avoid_leaks_too(seen, measured, tmp_path):
    """With swapped answers, or another one to prefer, the same prompt and answer are still the same text."""
    files = {"train": rows("a", 12), "validation": rows("v", 3), "test": rows("t", 3)}
    for name, place, side in (("train", 6, seen), ("test", 2, measured)):
        files[name][place] |= {"prompt": "BOTH", side: LONG}
    name = task(tmp_path / "t", **files)
    with pytest.raises(ArmError, match="a train row and a test row ask the same"):
        split(name)
    found = prompts(split(name, largest=7, drop_near_duplicates=True))
    assert "BOTH" not in found["pool"] and "BOTH" in found["test"]


@pytest.mark.parametrize(("first", "second"), [("train", "scorer"), ("validation", "scorer")])
def test_scorer_rows_are_no_rows_of_another_split(first, second, tmp_path):
    with pytest.raises(ArmError, match="ask the same"):
        split(doubled(tmp_path / "t", first, second, near=False))


def test_an_answer_that_two_prompts_share_leaks(tmp_path):
    files = {"train": rows("a", 12), "validation": rows("v", 3), "test": rows("t", 3)}
    for name, place, prompt, side in (("train", 6, "Why so", "rejected"), ("test", 2, "How come", "chosen")):
        files[name][place] |= {"prompt": prompt, side: LONG}
    with pytest.raises(ArmError, match="a train row and a test row say the same or nearly the same"):
        split(task(tmp_path / "t", **files))


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("largest", "sizes", "words"),
    [
        (1, {"validation": 13}, ["splits.validation=13", "only 12 rows"]),
        (1, {"scorer": 10}, ["splits.scorer=10", "only 9 rows"]),  # three are for validation
        (1, {"test": 4}, ["splits.test=4", "only 3 rows"]),
        (6, {}, ["6 training examples requested", "5 are left", "4 rows for the scorer and 3 for validation"]),
    ],
    ids=["validation", "scorer", "test", "train"],
)
def test_too_few_rows_are_refused(largest, sizes, words, tmp_path):
    name = task(tmp_path / "t", train=rows("a", 12), test=rows("t", 3))
    with pytest.raises(ArmError, match=r"Ask for fewer\.") as caught:
        split(name, largest, **sizes)
    assert [word for word in [name, *words] if word not in str(caught.value)] == [], caught.value


def test_too_few_rows_in_a_validation_file_are_refused(tmp_path):
    name = task(tmp_path / "t", train=rows("a", 12), validation=rows("v", 2), test=rows("t", 3))
    with pytest.raises(ArmError, match=r"splits\.validation=3, but only 2 rows"):
        split(name)
    with pytest.raises(ArmError, match=r"8 are left after 4 rows for the scorer\. Ask"):
        split(name, largest=9, validation=2)


DEMONSTRATIONS = [{"prompt": f"q{i}", "completion": f"answer{i}"} for i in range(12)]


@pytest.mark.parametrize("part", ["train", "test"])
def test_rows_that_are_no_pairs_are_refused(part, tmp_path):
    files = {"train": rows("a", 12), "test": rows("t", 3), part: DEMONSTRATIONS}
    with pytest.raises(ArmError, match=rf"preferences, but the {part} rows have \['prompt', 'completion'\]"):
        split(task(tmp_path / "t", **files))


def test_validation_rows_that_are_no_pairs_are_refused(tmp_path):
    name = task(tmp_path / "t", train=rows("a", 12), validation=DEMONSTRATIONS, test=rows("t", 3))
    with pytest.raises(ArmError, match="validation rows have"):
        split(name)


def test_a_missing_split_is_refused(tmp_path):
    with pytest.raises(ArmError, match=r"split 'test' expected, found \['train\.jsonl', 'validation\.jsonl'\]"):
        split(task(tmp_path / "t", train=rows("a", 12), validation=rows("v", 3)))
    with pytest.raises(ArmError, match="no such file or folder"):
        split(str(tmp_path / "nowhere"))


# -- budget -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factor", [1.5, 4.0])
def test_draws_start_at_the_arm_s_own_rate_and_stay_within_the_factor(factor, seed):
    budget = BudgetTable(trials=12, learning_rate=factor, steps=[8, 16])
    trials = draw(budget, seed)
    assert len(trials) == 12
    assert trials[0].rate == 1
    assert all(1 / factor <= t.rate <= factor and type(t.rate) is float for t in trials)
    assert {t.steps for t in trials} == {8, 16}
    assert len({t.rate for t in trials}) == 12
    assert trials == draw(budget, seed) != draw(budget, seed + 1)


def test_draws_are_log_uniform():
    rates = [math.log(t.rate, 4) for t in draw(BudgetTable(trials=2001, learning_rate=4.0), 0)[1:]]
    # uniform on [-1, 1]: mean 0 and standard deviation 1/√3, of the mean of 2000 draws 0.013
    assert sum(rates) / 2000 == pytest.approx(0, abs=0.05)
    assert sum(r < -0.5 for r in rates) / 2000 == pytest.approx(0.25, abs=0.05)


def test_without_a_range_of_rates_trials_are_the_numbers_of_steps():
    with pytest.raises(ValueError, match="only 2 settings"):
        BudgetTable(trials=4, learning_rate=1.0, steps=[8, 16])
    both = draw(BudgetTable(trials=2, learning_rate=1.0, steps=[8, 16]), 0)
    assert sorted(t.steps for t in both) == [8, 16] and {t.rate for t in both} == {1.0}
    assert len(draw(BudgetTable(trials=1, learning_rate=1.0, steps=[8, 16]), 0)) == 1


def test_a_setting_scales_the_arm_s_own_rate():
    assert Setting(rate=0.5, steps=3).trainer({"learning_rate": 0.2, "beta": 1}) == {
        "learning_rate": 0.1,
        "max_steps": 3,
    }
    assert Setting(rate=0.5).trainer({}) == {"max_steps": 0}


@pytest.mark.parametrize(
    ("trials", "halving", "rungs", "steps"),
    [
        (8, 2, [(8, 1 / 8), (4, 1 / 4), (2, 1 / 2), (1, 1)], 4 * 12),
        (9, 3, [(9, 1 / 9), (3, 1 / 3), (1, 1)], 3 * 12),
        (5, 2, [(5, 1 / 8), (3, 1 / 4), (2, 1 / 2), (1, 1)], (5 / 8 + 3 / 4 + 1 + 1) * 12),
        (5, 8, [(5, 1 / 8), (1, 1)], (5 / 8 + 1) * 12),
        (8, 1, [(8, 1)], 8 * 12),
        (1, 2, [(1, 1)], 12),
    ],
)
def test_rungs_and_steps_by_hand(trials, halving, rungs, steps):
    budget = BudgetTable(trials=trials, halving=halving, steps=[8, 16], landings=0)
    assert budget.rungs == [(count, pytest.approx(fraction)) for count, fraction in rungs]
    assert budget.steps_spent() == pytest.approx(steps)


def test_steps_spent_are_those_of_the_trials_drawn():
    budget = BudgetTable(trials=2, learning_rate=1.0, steps=[16, 8], landings=0)
    assert budget.steps_spent() == sum(t.steps for t in draw(budget, 0))
    assert budget.model_copy(update={"landings": 2}).steps_spent() == budget.steps_spent() + 2 * 12


@pytest.mark.parametrize(
    ("trials", "strengths", "expected"),
    [
        (2, [1.0, 2.0], [1, 2, 4, 8]),
        (1, [2.0, 1.0], [1, 8]),
        (3, [0.5], [0.5, math.sqrt(2), 4]),
        (1, [3.0], [3]),
        (2, [1.0, 100.0], [1, 100 ** (1 / 3), 100 ** (2 / 3), 100]),  # wide enough as given
    ],
)
def test_an_untrained_arm_tries_as_many_strengths(trials, strengths, expected):
    budget = BudgetTable(trials=trials, strengths=strengths)
    assert untrained_strengths(budget) == pytest.approx(expected)
    assert len(untrained_strengths(budget)) == len(draw(budget, 0)) * len(strengths)


# -- pairs made of other columns --------------------------------------------------------------------------------------

FILLED = {"prompt": "Say it: {toxic}", "chosen": "{neutral}", "rejected": "{toxic}"}


def paraphrases(folder: Path) -> Path:
    for split, start in (("train", 0), ("test", 20)):
        rows = [
            {"toxic": f"{WORDS[i]} rude", "neutral": [f"{WORDS[i]} mild", "other"]} for i in range(start, start + 20)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


WORDS = [f"{a}{b}" for a in "abcdefg" for b in "uvwxyz"]


def test_columns_become_conversational_pairs(tmp_path):
    sizes = SplitTable(validation=4, test=4, scorer=4)
    splits = load_splits(str(paraphrases(tmp_path)), sizes, 8, reading=Reading(FILLED))
    row = splits.test[0]
    word = row["rejected"][0]["content"].split()[0]
    assert row["prompt"] == [{"role": "user", "content": f"Say it: {word} rude"}]
    assert row["chosen"] == [{"role": "assistant", "content": f"{word} mild"}]
    assert row["rejected"] == [{"role": "assistant", "content": f"{word} rude"}]
    assert set(splits.pool.column_names) == {"prompt", "chosen", "rejected"}


@pytest.mark.parametrize("text", ["{toxc}", "{toxic", "{0}"])
def test_columns_that_cannot_be_filled_are_named(text, tmp_path):
    with pytest.raises(ArmError, match=r"cannot be filled in.*Its rows have \['toxic', 'neutral'\]"):
        load_splits(
            str(paraphrases(tmp_path)),
            SplitTable(validation=4, test=4, scorer=4),
            8,
            reading=Reading({**FILLED, "chosen": text}),
        )
