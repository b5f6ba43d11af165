"""Arms that learn from the base model's own answers, or from more chosen answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny_data import conversational, pairs, save_task, tokenizer
from tiny_grids import make_tables
from tiny_models import tiny

from steertune.recipes.ablation.budget import Setting
from steertune.recipes.ablation.context import Context
from steertune.recipes.ablation.grid import make_grid
from steertune.recipes.lab.arm import load_arm, make_arm
from steertune.recipes.lab.data import load_splits
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.generation import generate
from steertune.recipes.lab.ingredients import Training
from steertune.recipes.lab.ingredients.answers import Answers
from steertune.recipes.lab.tables import DataTable
from steertune.recipes.lab.training import make_trainer, training_of

ARM = {"name": "own", "data": {"name": "nowhere"}, "trainer": {"max_steps": 2}}
MODEL = tiny(max_position_embeddings=512, vocab_size=22)


def training(rows: Dataset, folder: Path, **answers: Any) -> Training:
    return training_of(make_arm({**ARM, "answers": answers}), MODEL, tokenizer(), rows, folder)


def test_sampled_rejected_answers_are_what_the_base_says_to_each_prompt(tmp_path):
    rows = conversational(pairs(5))
    ready = training(rows, tmp_path, rejected="sample", temperature=0.0, new_tokens=6)
    ready.arm.get(Answers).apply(ready)
    # one prompt at a time, without any padding
    slow = [generate(MODEL, tokenizer(), [row["prompt"]], 6)[0] for row in rows.to_list()]
    assert [row["rejected"][0]["content"] for row in ready.rows.to_list()] == slow
    assert ready.rows.remove_columns("rejected").to_list() == rows.remove_columns("rejected").to_list()
    assert "rejected answers are the base model's own (sample)" in ready.notes["answers"]


def test_answers_behind_instructions_stand_behind_the_prompts_as_they_are(tmp_path):
    rows = conversational(pairs(3))
    options = {"chosen": "instructed", "rejected": "opposed", "positive": "we stay", "negative": "you go"}
    ready = training(rows, tmp_path, **options, temperature=0.0, new_tokens=6)
    ready.arm.get(Answers).apply(ready)
    for row, before in zip(ready.rows.to_list(), rows.to_list(), strict=True):
        assert row["prompt"] == before["prompt"]
        for side, text in (("chosen", "we stay"), ("rejected", "you go")):
            asked = [{"role": "user", "content": f"{text}\n\n{before['prompt'][0]['content']}"}]
            assert row[side] == [{"role": "assistant", "content": generate(MODEL, tokenizer(), [asked], 6)[0]}]


def test_every_training_on_the_same_prompts_gets_the_same_answers(tmp_path):
    rows, cache = pairs(4), {}
    answers = []
    for seed in (0, 0, 1):
        ready = training(rows, tmp_path, rejected="sample")
        ready.cache, ready.seed = cache, seed
        ready.arm.get(Answers).apply(ready)
        answers.append(ready.rows["rejected"][:])
    assert answers[0] == answers[1] != answers[2] and len(cache) == 2


def test_a_trainer_learns_from_the_answers(tmp_path):
    trainer = make_trainer(training(pairs(4), tmp_path, rejected="sample", temperature=0.0))
    expected = generate(MODEL, tokenizer(), pairs(4)["prompt"][:], 40)
    words = [tokenizer().decode(row["rejected_ids"], skip_special_tokens=True) for row in trainer.train_dataset]
    assert words == expected


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"temperature": 0.5}, "changes nothing"),
        ({"chosen": "sample"}, "chosen"),
        ({"rejected": "sampled"}, "rejected"),
    ],
)
def test_tables_that_mean_nothing_are_refused(answers, message):
    with pytest.raises(ArmError, match=message):
        make_arm({**ARM, "answers": answers})


def test_missing_instructions_and_columns_are_named(tmp_path):
    with pytest.raises(ArmError, match=r"'nowhere' has no instructions.*Set answers\.positive"):
        training(pairs(2), tmp_path, chosen="instructed")
    bare = training(pairs(2).remove_columns("prompt"), tmp_path, rejected="sample")
    with pytest.raises(ArmError, match=r"needs the columns \['prompt'\]"):
        bare.arm.get(Answers).apply(bare)


def test_a_task_gives_its_own_instructions(tmp_path, monkeypatch):
    arm = load_arm("vector_on_policy_dpo", ["--data.name=lower_case", "--answers.new_tokens=2"])
    ready = training_of(arm, MODEL, tokenizer(), conversational(pairs(2)), tmp_path)
    prompts = []
    monkeypatch.setattr(
        "steertune.recipes.lab.ingredients.answers.generate",
        lambda _model, _tokenizer, asked, *_args, **_options: prompts.extend(asked) or ["we"] * len(asked),
    )
    ready.arm.get(Answers).apply(ready)
    assert prompts[0][0]["content"].startswith("Write everything in lower case")
    assert not prompts[2][0]["content"].startswith("Write"), "the rejected answers are to the bare prompts"


def test_twice_as_many_examples_hold_the_same_first_half(tmp_path):
    task = save_task(tmp_path, train=pairs(12, 0), test=pairs(12, 1))
    once, twice = (load_splits(DataTable(name=task, train=4, test=4, times=times))[0] for times in (1, 2))
    assert len(twice) == 8 and twice.to_list()[:4] == once.to_list()


def test_a_grid_gives_one_arm_twice_as_many_examples(tmp_path):
    tables = make_tables(tmp_path)
    tables["factors"] = {
        "contrast": {
            "pairs": {},
            "none": {"loss": {"contrast": "none"}},
            "none_twice": {"loss": {"contrast": "none"}, "data": {"times": 2}},
        }
    }
    tables["design"] = {"kind": "full"}
    tables["claim"] = {"better": "contrast=pairs", "than": "contrast=none_twice", "strength": "tuned"}
    grid = make_grid(tables)
    context, cells = Context(grid), {cell.arm.name: cell for cell in grid.cells() if cell.seed == 0}
    counts = {
        name: len(context.training(cell, 0, MODEL, tmp_path, Setting()).rows)
        for name, cell in cells.items()
        if name.startswith("contrast")
    }
    assert counts == {"contrast=pairs": 4, "contrast=none": 4, "contrast=none_twice": 8}
    assert len({cell.key for cell in cells.values()}) == len(cells)
