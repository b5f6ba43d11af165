"""What new users do first: one file of 50 pairs in repeng's columns, and real weights without a chat template."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from steertune.recipes import ablate, chat, distill, export, report, serve, sweep, train
from steertune.recipes.lab import trained_on
from steertune.recipes.lab.files import read_rows
from steertune.recipes.lab.held_out import held_out_rows
from steertune.recipes.lab.observe import NEUTRAL
from steertune.recipes.lab.paths import TASKS
from steertune.recipes.lab.rows import Record

pytestmark = pytest.mark.slow

DIVIDED = "`pairs.jsonl` is one file of 50 rows, divided by a hash of the text: 42 training rows and 8 held-out rows"
QUESTION = "Question: Where can a visitor find daisies?\nAnswer:"
GRID = """
name = "first"
arms = ["vector_dpo", "vector_ce"]
tasks = [{{ name = "{data}", scorer = {{ kind = "classifier" }} }}]
model = {{ name = "{model}" }}
neutral = "{neutral}"
examples = [8]
seeds = [0]
generations = 2
new_tokens = 8
splits = {{ validation = 8, test = 8, scorer = 8 }}
budget = {{ trials = 1, steps = [2], strengths = [1.0] }}
matched = {{ kl = 0.1 }}
[card]
problem = "Does the rejected answer help with eight pairs?"
hypothesis = "It does."
against = "Cross-entropy is at least as accurate."
baselines = "Cross-entropy on the chosen answers."
affordances = {{ "*" = "the same eight pairs" }}
[claim]
better = "vector_dpo"
than = "vector_ce"
measure = "accuracy"
strength = "tuned"
"""


@pytest.fixture(scope="module")
def home(real: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model in base/, pairs.jsonl, and a vector trained on it in run/."""
    home = tmp_path_factory.mktemp("first")
    model, tokenizer = real
    model.save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    base = AutoTokenizer.from_pretrained(home / "base")
    base.chat_template = None
    base.save_pretrained(home / "base")
    (home / "base" / "chat_template.jinja").unlink(missing_ok=True)
    rows = [json.loads(line) for line in (TASKS / "lower_case" / "train.jsonl").read_text().splitlines()[:50]]
    write(home / "pairs.jsonl", [repeng(row) for row in rows])
    words = {"trainer.max_steps": 12, "evaluation.generations": 6, "evaluation.strengths": "[1.0]"}
    assert train.main(arm_words(home, "run", {"data.train": 24, **words})) == 0
    return home


def repeng(row: dict[str, Any]) -> dict[str, str]:
    """A pair as two whole texts."""
    question = row["prompt"][0]["content"]
    sides = {"positive": "chosen", "negative": "rejected"}
    return {name: f"Question: {question}\nAnswer: {row[side][0]['content']}" for name, side in sides.items()}


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arm_words(home: Path, folder: str, options: dict[str, Any]) -> list[str]:
    options = {
        "model.name": home / "base",
        "data.name": home / "pairs.jsonl",
        "evaluation.new_tokens": 16,
        "output.folder": home / folder,
        **options,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def test_train_shows_the_behaviour_on_rows_that_were_held_out(home: Path) -> None:
    record = Record.read(home / "run" / "result.json")
    page = (home / "run" / "page.md").read_text()
    assert DIVIDED in page and "Used here: 24 for training, 8 held out." in page
    assert DIVIDED in (home / "run" / "adapter" / "README.md").read_text()
    held_out, _ = held_out_rows(str(home / "pairs.jsonl"), [home / "run" / "adapter"])
    assert len(held_out) == record.facts["held_out"] == 8
    [rows] = trained_on.read(home / "run" / "adapter") or []
    assert len(rows.hashes) == 24 and rows.resembling(held_out.to_list()) == []
    # the vector did what it was trained for, and the page begins with it
    assert record.value("margin", 1) > record.value("margin") + 2 and 0 < record.value("kl", 1) < 1.5
    answers = [answer for answer in record.observations["1"]["answer"] if answer]
    assert len(answers) >= 3 and sum(answer == answer.lower() for answer in answers) >= 3
    assert page.splitlines()[2].startswith("**The answers changed**"), page.splitlines()[2]


def test_sweep_chooses_on_validation_rows_and_reports_its_counts(home: Path) -> None:
    words = [str(home / "pairs.jsonl"), "--model", str(home / "base"), "--layers", "15", "--strengths", "2"]
    sizes = ["--train", "16", "--validation", "8", "--test", "8", "--generations", "1", "--new-tokens", "8"]
    assert sweep.main([*words, *sizes, "--folder", str(home / "sweep")]) == 0
    page = (home / "sweep" / "page.md").read_text()
    assert DIVIDED in page and "16 training pairs, 8 validation and 8 test pairs" in page
    assert "## Recommended: " in page and "Every setting (validation rows)" in page


def test_ablate(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, folder = tmp_path / "grid.toml", tmp_path / "grid"
    neutral = tmp_path / "neutral.jsonl"
    write(neutral, [json.loads(line) for line in NEUTRAL.read_text().splitlines()[:8]])
    grid.write_text(GRID.format(data=home / "pairs.jsonl", model=home / "base", neutral=neutral))
    words = [str(grid), "--folder", str(folder)]
    assert ablate.main([*words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "2 cells: 2 arms" in printed and "8 test rows; of the training rows 8 for validation" in printed
    assert not folder.exists(), "a dry run leaves nothing"
    assert ablate.main(words) == 0 and report.main([str(folder)]) == 0
    cells = pd.read_parquet(folder / "cells.parquet")
    assert sorted(cells["arm"].unique()) == ["vector_ce", "vector_dpo"]
    assert DIVIDED in (folder / "report.md").read_text()


def test_distill_counts_the_prompts_that_were_answered(home: Path) -> None:
    options = {"views.good.text": "Answer in lower case only.", "data.train": 12, "trainer.max_steps": 4}
    words = arm_words(home, "distilled", {**options, "evaluation.generations": 1})
    assert distill.main(["vector_distillation", *words]) == 0
    record = Record.read(home / "distilled" / "result.json")
    facts, page = record.facts, (home / "distilled" / "page.md").read_text()
    assert facts["train_prompts"] + facts["test_prompts"] + facts["unanswered"] == 12 + 8
    assert f"on {facts['test_prompts']} test prompts, after {facts['train_prompts']} training prompts" in page
    assert DIVIDED in page and -1 < record.value("fidelity", 1) <= 1
    answers = read_rows(home / "distilled" / "answers.jsonl", "")
    assert len(answers) == facts["train_prompts"] and all(row["completion"].strip() for row in answers)
    assert trained_on.read(home / "distilled" / "adapter")


def test_chat_continues_a_line_with_and_without_the_vector(home: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(
        "sys.stdin", io.StringIO(f"{QUESTION.replace(chr(10), ' ')}\n/strength 0\nDaisies grow\n/quit\n")
    )
    assert chat.main([str(home / "run" / "adapter"), "--new-tokens", "12"]) == 0
    printed = capsys.readouterr().out
    assert "The tokenizer has no chat template: every line is a separate prompt" in printed
    lines = [line.partition("> ")[2] for line in printed.splitlines() if "> " in line]
    assert len(lines) == 4 and all(lines)
    assert lines[0] != lines[1] and lines[2] == lines[3], "strength 0 is the base model"


def test_eval_and_train_say_the_same_of_the_held_out_rows(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    from steertune.recipes import eval as recipe

    assert recipe.main([str(home / "run" / "adapter"), "--tasks", str(home / "pairs.jsonl"), "--json"]) == 0
    printed = capsys.readouterr()
    assert "pairs.jsonl: 8 rows. `pairs.jsonl` is one file of 50 rows" in printed.err
    numbers, record = json.loads(printed.out), Record.read(home / "run" / "result.json")
    assert [numbers[at]["pairs"]["acc,none"] for at in "01"] == [record.value("accuracy", at) for at in "01"]


def test_serve_and_the_merged_export_answer_alike(home: Path, tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    write(requests, [{"id": at, "prompt": QUESTION, "vector": "a", "strength": at, "new_tokens": 12} for at in (0, 1)])
    requests.write_text(f"{requests.read_text()}no request\n")
    words = [f"a={home / 'run' / 'adapter'}", "--input", str(requests), "--output", str(tmp_path / "answers.jsonl")]
    assert serve.main(words) == 1
    base, steered, refused = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert base["answer"] != steered["answer"] != "" and "Line 3 is not a JSON object" in refused["error"]

    words = [str(home / "run" / "adapter"), "--to", "merged", "--output", str(tmp_path / "merged")]
    assert export.main(words) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    inputs = tokenizer(QUESTION, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == steered["answer"]
