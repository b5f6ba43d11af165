"""Training for contrast prompts: what is built, what is measured, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_data
from tiny_models import tiny

from steertune.recipes import contrast_prompts as recipe
from steertune.recipes.ablation import contrast_page
from steertune.recipes.ablation.tables import TaskTable
from steertune.recipes.lab import pages
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.rows import Record

TASKS = [TaskTable(name="one"), TaskTable(name="one", reverse=True)]
CONDITIONS = [f"{who}, {name}" for name in ("plain", "k-shot", "contrast") for who in ("base", "trained")]


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A file with two tasks of local pairs, and a tiny local model."""
    tiny_data.save_model(tmp_path / "model", max_position_embeddings=512)
    for task in ("one", "two"):
        seed = ord(task[0])
        tiny_data.save_task(tmp_path / task, train=tiny_data.pairs(16, seed + 8), test=tiny_data.pairs(5, seed + 7))
    file = tmp_path / "mixture.toml"
    file.write_text(
        f"""
seen = [{{ name = "one" }}, {{ name = "one", reverse = true }}]
unseen = [{{ name = "two" }}]
steering = ["mean_difference"]
demonstrations = 2
examples = 4
pairs = 4
seeds = [0, 1]
splits = {{ validation = 2, scorer = 0, test = 4, near_duplicates = 1.0 }}
trainer = {{ max_steps = 2, save_strategy = "no", disable_tqdm = true }}
model = {{ name = "{tmp_path / "model"}" }}
"""
    )
    return file


def make(file: Path, **changes) -> recipe.Mixture:
    return recipe.Mixture(recipe.read(str(file)).model_copy(update=changes), file.parent)


def test_contrast_prompts_show_pairs_of_their_own_task_in_its_direction(mixture):
    study = make(mixture)
    rows = study.contrast_prompts()
    assert len(rows) == 8
    pool = study.splits["one"].train(4, 0).to_list()
    for row in rows:
        [own] = [r for r in pool if row["prompt"].rstrip().endswith(f"{r['prompt'].strip()}\nGood response:")]
        good = "chosen" if row["chosen"] == own["chosen"] else "rejected"  # rejected: the reversed task
        bad = {"chosen": "rejected", "rejected": "chosen"}[good]
        assert row["rejected"] == own[bad]
        shown = [r for r in pool if f"{r['prompt'].strip()}\nGood response: {r[good]}\nBad response: {r[bad]}" in row["prompt"]]  # fmt: skip  # noqa: E501
        assert len(shown) == 2
        assert own not in shown
    assert sorted(row["chosen"] for row in rows) == sorted(row["rejected"] for row in rows), "both directions"


def test_every_condition_is_measured_and_a_run_goes_on(mixture, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    words = [str(mixture), "--data-root", str(tmp_path), "--threads", "1", "--folder", str(run)]
    assert recipe.main(words) == 0
    result = json.loads((run / "result.json").read_text())
    seen, cells = (margins_in(result[part]) for part in ("seen", "cells"))
    assert list(cells) == [("two", 0), ("two", 1)]
    for margins in cells.values():
        assert list(margins) == [*CONDITIONS, "mean_difference"]
        assert {len(values) for values in margins.values()} == {4}
        assert margins["base, plain"] != margins["trained, plain"]
    first, second = cells.values()
    assert first["base, plain"] == second["base, plain"]
    assert first["base, contrast"] != second["base, contrast"], "another draw of pairs"
    assert list(seen) == [("one", 0), ("one", 1), ("one_reversed", 0), ("one_reversed", 1)]
    for margins in seen.values():
        assert list(margins) == [name for name in CONDITIONS if "k-shot" not in name]
        assert {len(values) for values in margins.values()} == {4}
        assert margins["base, contrast"] != margins["trained, contrast"]
    forward, backward = seen["one", 0], seen["one_reversed", 0]
    assert forward["base, plain"] == pytest.approx([-margin for margin in backward["base, plain"]])
    page = (run / "page.md").read_text()
    assert "| trained, contrast, nats | base, contrast, nats |" in page and "one_reversed |" in page
    assert "| trained, contrast | base, contrast |" in page
    assert recipe.main(words) == 2
    assert "finished run" in capsys.readouterr().err
    (run / "result.json").unlink()
    (run / "page.md").unlink()
    monkeypatch.setattr(recipe, "fit", lambda *_: pytest.fail("the adapter is there"))
    evaluate = recipe.evaluate

    def on_neutral_text_alone(model, held_out, names):
        assert "margin" not in names, "the records are there"
        return evaluate(model, held_out, names)

    monkeypatch.setattr(recipe, "evaluate", on_neutral_text_alone)
    assert recipe.main(words) == 0
    again = json.loads((run / "result.json").read_text())
    assert (again["cells"], again["seen"]) == (result["cells"], result["seen"])
    effects = [Record.from_json(one["side_effects"], run).means()["1"] for one in (result, again)]
    assert effects[0] == pytest.approx(effects[1], rel=1e-4)
    assert (run / "page.md").read_text() == page


def margins_in(records: list[dict]) -> dict[tuple[str, int], dict[str, list[float]]]:
    """By task and seed, the margins of every condition."""
    margins: dict = {}
    for record in (Record.from_json(one, Path()) for one in records):
        of_cell = margins.setdefault((record.keys["task"], record.keys["seed"]), {})
        of_cell[record.keys["arm"]] = record.seen(1)["margin"].tolist()
    return margins


def test_the_check_asks_about_held_out_rows_behind_the_pairs_that_were_trained_on(mixture):
    study = make(mixture)
    for task in study.seen:
        splits = study.splits[task.label]
        trained_on, test = splits.train(4, 0).to_list(), splits.test.to_list()
        seen = {name: study._shown(task, 1, name).to_list() for name in ("plain", "contrast")}
        assert seen["plain"] == test and not {r["prompt"] for r in test} & {r["prompt"] for r in trained_on}
        for own, row in zip(test, seen["contrast"], strict=True):
            *shown, asked = row["prompt"].split("\n\n")
            assert asked == f"{own['prompt'].strip()}\nGood response: " and row == {**own, "prompt": row["prompt"]}
            for text in shown:
                [other] = [r for r in trained_on if text.startswith(r["prompt"].strip() + "\n")]
                assert text.endswith(f"\nGood response: {other['chosen']}\nBad response: {other['rejected']}")
            assert len(shown) == 2


@pytest.mark.parametrize("better", [0.75, 0.0])
def test_the_page_says_whether_the_training_took(better):
    cells = [one for task in ("one", "one_reversed") for seed in range(6) for one in cell(task, seed, better)]
    neutral = {"neutral_kl": [0.0], "neutral_nll": [1.0], "neutral_tokens": [1]}
    effects = Record({"arm": "trained", "task": "neutral", "examples": 4, "seed": 0}, {"0": neutral, "1": neutral})
    text = pages.markdown(contrast_page.page("A study.", ["vector_dpo"], TASKS, cells, cells, effects))
    assert ("It responds to contrast prompts of the tasks" in text) == (better > 0)
    assert ("too little training as well as no transfer" in text) == (better == 0)
    gain = contrast_page.responses(cells, TASKS)["trained, contrast, nats", "base, contrast, nats"]
    assert gain.estimate == pytest.approx(2 * better), "from -1 to 1 in this share of the pairs"


def test_a_task_and_its_reverse_are_one_task_that_shows_and_trains_on_other_rows(mixture):
    cells = [one for task in ("one", "one_reversed") for seed in range(2) for one in cell(task, seed, 0.5)]
    both, apart = (contrast_page.values(cells, "margin", tasks)["base, plain"].index for tasks in (TASKS, ()))
    assert both.tolist() == [("one", f"{task} {seed}") for task in ("one", "one_reversed") for seed in (0, 1)]
    assert apart.tolist() == [(task, seed) for task in ("one", "one_reversed") for seed in (0, 1)]
    study = make(mixture, unseen=["two", TaskTable(name="two", reverse=True, draw=1)], demonstrations=3)
    for tasks, prompt in ((study.seen, "contrast"), (study.unseen, "k-shot")):
        one, other = (study._shown(task, 0, prompt)["prompt"] for task in tasks)
        assert [a.split("\n")[-1] for a in one] == [b.split("\n")[-1] for b in other], "the same rows are asked"
        assert all({*a.split("\n\n")[:-1]} != {*b.split("\n\n")[:-1]} for a, b in zip(one, other, strict=True))
    one, other = (sorted(study._pairs(task, 0)["prompt"]) for task in study.unseen)
    assert one != other


def cell(task: str, seed: int, better: float) -> list[Record]:
    """Records of eight pairs: the trained model's contrast prompt is right in a share of them, all else is wrong."""
    margins = {name: [-1.0] * 8 for name in [*CONDITIONS, "vector_dpo"]}
    margins["trained, contrast"] = [1.0] * int(8 * better) + [-1.0] * (8 - int(8 * better))
    margins["base, k-shot"] = [0.0] * 8  # a tie counts half
    return [
        Record(
            {"arm": name, "task": task, "examples": 4, "seed": seed},
            {"1": {"chosen_logp": values, "rejected_logp": [0.0] * 8}},
        )
        for name, values in margins.items()
    ]


def test_questions_by_hand():
    cells = [one for task in ("a", "b") for seed in range(6) for one in cell(task, seed, 0.5 + 0.125 * (seed % 3))]
    found = contrast_page.values(cells, "accuracy")
    assert np.mean(found["base, k-shot"].iloc[0]) == 0.5
    answers = contrast_page.questions(found, ["vector_dpo"])
    gain = answers["trained, contrast", "base, contrast"]
    assert gain.estimate == pytest.approx(0.625)
    assert gain.crossed.low < 0.625 < gain.crossed.high
    assert gain.p < 0.05
    assert answers["base, contrast", "base, plain"].estimate == 0
    assert answers["base, contrast", "base, plain"].p == 1
    assert answers["base, contrast", "base, k-shot"].estimate == -0.5
    assert len(answers) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unseen": ["one"]}, "are data of both seen and unseen tasks"),
        ({"unseen": [TaskTable(name="two", label="one")]}, "Two tasks are called 'one'"),
        ({"demonstrations": 5}, "pairs=4 of an unseen task.*the 5 demonstrations"),
        ({"demonstrations": 4}, "examples=4 of a seen task.*the 4 demonstrations"),
        ({"unseen": ["two", TaskTable(name="two", reverse=True)]}, "would train on the same rows of '.*give one"),
        ({"arm": "full_dpo"}, "Choose an arm with an adapter"),
        ({"arm": "prompt_contrast"}, "is a prompt"),
        ({"steering": ["prompt_contrast"]}, "is a prompt"),
        ({"steering": ["lora_templates_dpo"]}, "contrast_prompts makes no further examples"),
        ({"arm": "lora_templates_dpo"}, "contrast_prompts makes no further examples"),
        ({"steering": ["vector_dop"]}, "Did you mean 'vector_dpo'"),
        ({"examples": 40}, "40 training examples requested"),
        ({"loss": {"name": "dop"}}, "dop"),
    ],
)
def test_bad_tables(mixture, changes, message):
    with pytest.raises((ArmError, ValueError), match=message):
        make(mixture, **changes)


def test_arms_do_not_choose_their_pairs(mixture, tmp_path):
    (tmp_path / "mine.toml").write_text('[data]\nname = "one"\npairing = "shuffled"')
    with pytest.raises(ArmError, match="data.pairing must be 'own' .got 'shuffled'"):
        make(mixture, steering=[str(tmp_path / "mine.toml")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sen = []", "Did you mean 'seen'"),
        ('seen = [{ name = "one", reversed = true }]\nunseen = ["two"]', "Did you mean 'reverse'"),
        ("seen = []\nunseen = ['two']", "seen"),
        ("seen = ", "not valid TOML"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(ArmError, match=message):
        recipe.read(str(tmp_path / "bad.toml"))
    with pytest.raises(ArmError, match="embedded"):
        recipe.read("nowhere")


def test_prompts_beyond_the_context_are_refused(mixture, tmp_path):
    tiny(max_position_embeddings=32).save_pretrained(tmp_path / "model")
    with pytest.raises(ArmError, match="the model reads 32"):
        make(mixture).run(tmp_path / "run")


@pytest.mark.parametrize(("task", "rows"), [("one", "train"), ("two", "test")])
def test_long_answers_are_refused_before_anything_is_trained(task, rows, mixture, tmp_path, monkeypatch):
    file = tmp_path / task / f"{rows}.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    made = [{**row, "rejected": " ".join(["sea"] * (500 + i))} for i, row in enumerate(lines)]
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    monkeypatch.setattr(recipe, "make_trainer", lambda *_: pytest.fail("nothing is trained"))
    with pytest.raises(ArmError, match=r"(seen tasks|Task 'two', .*): a prompt and its answer take .*reads 512"):
        make(mixture).run(tmp_path / "run")


def test_the_files_of_the_project_are_read():
    for file in recipe.MIXTURES.glob("*.toml"):
        assert recipe.read(file.stem).unseen
    recipe.Mixture(recipe.read("embedded"))
