"""A base model, whose tokenizer has no chat template: every recipe runs on one file of plain-text pairs."""

from __future__ import annotations

import io
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tiny_data
from tiny_models import tiny

from steertune.recipes import (
    ablate,
    chat,
    contrast_prompts,
    distill,
    export,
    report,
    serve,
    sweep,
    train,
)
from steertune.recipes.lab.rows import Record
from steertune.recipes.studies import probes
from steertune.recipes.vectors import main as vectors

GRID = """
name = "base"
arms = ["vector_dpo", "vector_ce", "mean_difference", "prompt_both", "vector_neutral_dpo"]
examples = [4]
seeds = [0, 1]
generations = 2
new_tokens = 4
trainer = { per_device_train_batch_size = 2 }
splits = { validation = 4, test = 6, scorer = 12, near_duplicates = 1.0 }
matched = { kl = 1e-4 }
budget = { trials = 2, steps = [2], strengths = [1.0] }
[card]
problem = "Which arm learns from four pairs?"
hypothesis = "The vector does."
against = "The other one is at least as accurate."
baselines = "The mean difference."
affordances = { "*" = "the same pairs" }
[claim]
better = "vector_dpo"
than = "vector_ce"
measure = "accuracy"
strength = "tuned"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, 50 plain-text pairs in train.jsonl, test pairs, and a trained vector in run/."""
    home = tmp_path_factory.mktemp("base")
    tiny(max_position_embeddings=512).save_pretrained(home / "model")
    tiny_data.tokenizer(template=None).save_pretrained(home / "model")
    (home / "pairs").mkdir()
    for split, rows in (("train", 50), ("test", 24)):
        tiny_data.pairs(rows, seed=rows).to_json(home / "pairs" / f"{split}.jsonl")
    assert train.main(["vector_dpo", *arm_words(home, "run")]) == 0
    return home


def arm_words(home: Path, folder: str) -> list[str]:
    options = {
        "model.name": home / "model",
        "model.threads": 1,
        "data.name": home / "pairs",
        "data.train": 8,
        "data.test": 8,
        "trainer.max_steps": 3,
        # a trained vector of a tiny random model would not move a logit beyond rounding
        "trainer.learning_rate": 0.5,
        "evaluation.new_tokens": 4,
        "output.folder": home / folder,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def test_train_measures_neutral_text_and_answers_as_plain_text(home: Path) -> None:
    record = Record.read(home / "run" / "result.json")
    assert record.value("kl", 1) > 0 and len(record.observations["1"]["neutral_kl"]) == 16
    assert len(record.observations["1"]["answer"]) == 3
    assert (home / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_sweep(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(home / "pairs"), "--model", str(home / "model"), "--layers", "1", "2", "--strengths", "1", "2"]
    sizes = ["--train", "8", "--validation", "6", "--test", "8", "--generations", "2", "--new-tokens", "4"]
    assert sweep.main([*words, *sizes, "--threads", "1", "--folder", str(home / "sweep")]) == 0
    assert "Every setting (validation rows)" in capsys.readouterr().out


@pytest.mark.parametrize("arm", ["vector_distillation", "vector_demonstrations_distillation"])
def test_distill(home: Path, arm: str) -> None:
    assert distill.main([arm, *arm_words(home, arm)]) == 0
    assert "Fidelity" in (home / arm / "page.md").read_text()


def test_ablate_and_report(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = tomllib.loads(GRID)
    assert tables["name"] == "base"
    scorer = '{ kind = "classifier" }'
    task = (
        f'tasks = [{{ name = "{home / "pairs"}", instructions = ["say red"], instructions_by = "the test", scorer = '
    )
    model = f'model = {{ name = "{home / "model"}", threads = 1 }}\n'
    (tmp_path / "grid.toml").write_text(f"{task}{scorer} }}]\n{model}{GRID}")
    words = [str(tmp_path / "grid.toml"), "--folder", str(tmp_path / "grid"), "--threads", "1"]
    assert ablate.main([*words, "--dry-run"]) == 0
    assert "cells: 5 arms" in capsys.readouterr().out
    assert not (tmp_path / "grid").exists(), "a dry run leaves nothing"
    assert ablate.main(words) == 0
    assert report.main([str(tmp_path / "grid")]) == 0


def test_chat_continues_lines(home: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat runs\nred sky\n"))
    assert chat.main([str(home / "run" / "adapter"), "--model", str(home / "model"), "--new-tokens", "4"]) == 0
    printed = capsys.readouterr().out
    assert "no chat template" in printed
    assert printed.count("base> ") == printed.count("+1> ") == 2


def test_serve_answers_text_and_refuses_messages(home: Path, tmp_path: Path) -> None:
    requests = [{"prompt": "the cat runs", "vector": "a"}, {"prompt": [{"role": "user", "content": "the cat"}]}]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(one) + "\n" for one in requests))
    words = [
        f"a={home / 'run' / 'adapter'}",
        "--model",
        str(home / "model"),
        "--input",
        str(tmp_path / "requests.jsonl"),
    ]
    assert serve.main([*words, "--output", str(tmp_path / "answers.jsonl")]) == 1
    text, messages = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert isinstance(text["answer"], str) and "no chat template" in messages["error"]


def test_eval_on_pairs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    from steertune.recipes import eval as recipe

    words = [str(home / "run" / "adapter"), "--model", str(home / "model"), "--limit", "4", "--json"]
    assert recipe.main([*words, "--tasks", str(home / "pairs" / "test.jsonl")]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert set(numbers) == {"0", "1"} and 0 <= numbers["1"]["test"]["acc,none"] <= 1


def test_merged_exports_are_served_as_they_are(home: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = [str(home / "run" / "adapter"), "--model", str(home / "model"), "--to", "merged"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat runs\nred sky\n")
    assert export.main([*words, "--output", str(tmp_path / "merged"), "--prompts", str(prompts)]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("the cat")["input_ids"] == tiny_data.tokenizer()("the cat")["input_ids"]
    assert (tmp_path / "merged" / "generation_config.json").is_file()
    assert model.generate(**tokenizer("the cat", return_tensors="pt"), max_new_tokens=2).shape == (1, 4)


def test_two_vectors_together(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, adapter = str(home / "pairs"), home / "run" / "adapter"
    other = home / "other"
    if not other.exists():
        assert vectors(["add", str(adapter), "--weights", "0.5", "--output", str(other)]) == 0
    words = ["together", str(adapter), str(other), "--data", pairs, pairs, "--rows", "6", "--threads", "1"]
    assert vectors([*words, "--model", str(home / "model")]) == 0
    assert "On pairs" in capsys.readouterr().out


def test_contrast_prompts(home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for split, rows in (("train", 24), ("test", 8)):
        tiny_data.pairs(rows, seed=100 + rows).to_json(other / f"{split}.jsonl")
    (tmp_path / "mixture.toml").write_text(
        f'seen = ["{home / "pairs"}"]\nunseen = ["{other}"]\narm = "vector_dpo"\nsteering = ["vector_dpo"]\n'
        f'model = {{ name = "{home / "model"}" }}\ndemonstrations = 2\nexamples = 8\npairs = 4\nseeds = [0]\n'
        "trainer = { max_steps = 2 }\nsplits = { validation = 2, scorer = 0, test = 6, near_duplicates = 1.0 }\n"
    )
    assert contrast_prompts.main([str(tmp_path / "mixture.toml"), "--folder", str(tmp_path / "study")]) == 0
    assert (tmp_path / "study" / "page.md").is_file()


def test_probes_read_conversations_as_text(home: Path, tmp_path: Path) -> None:
    for split, rows in (("train", 16), ("test", 8)):
        tiny_data.conversational(tiny_data.pairs(rows, seed=rows)).to_json(tmp_path / f"{split}.jsonl")
    words = [str(tmp_path), "--model", str(home / "model"), "--train", "16", "--test", "8", "--threads", "1"]
    assert probes.main([*words, "--methods", "mean_difference", "--folder", str(tmp_path / "probes")]) == 0
