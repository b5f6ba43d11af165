"""Planted problems: the data are the teacher's, and the studies are counted as they should be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steertune.recipes import planted


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "base"
    planted.save_base(folder)
    return folder


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def logp(model, tokenizer, prompt: str, answer: str) -> float:
    """One row, one token after the other."""
    ids = tokenizer(prompt + answer, add_special_tokens=False, return_tensors="pt").input_ids
    length = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(float(logps[i - 1, ids[0, i]]) for i in range(length, ids.shape[1]))


@pytest.mark.parametrize("problem", ["bias", "gated", "lora"])
def test_the_teacher_prefers_every_chosen_answer(problem, base, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    planted.write_task(tmp_path, model, problem, seed=3)
    teacher = planted.make_teacher(model, problem, 3)
    pairs = rows(tmp_path / "test.jsonl")[:20]
    sides = [
        [logp(m, tokenizer, p["prompt"], p[s]) for s in ("chosen", "rejected")] for p in pairs for m in (teacher,)
    ]
    assert all(chosen > rejected for chosen, rejected in sides)
    # the base does not know it all, or there would be nothing to learn
    of_base = [logp(model, tokenizer, p["prompt"], p["chosen"]) > logp(model, tokenizer, p["prompt"], p["rejected"])
               for p in rows(tmp_path / "test.jsonl")]  # fmt: skip
    assert 0.4 < np.mean(of_base) < 0.95


@pytest.mark.parametrize(("problem", "test_is_a_coin"), [("base", True), ("shuffled", False)])
def test_labels_without_a_teacher_are_a_coins(problem, test_is_a_coin, base, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    planted.write_task(tmp_path, model, problem, seed=5)
    teacher = planted.make_teacher(model, problem, 5)

    def agreement(split: str) -> float:
        pairs = rows(tmp_path / f"{split}.jsonl")[:100]
        return float(np.mean([logp(teacher, tokenizer, p["prompt"], p["chosen"])
                              > logp(teacher, tokenizer, p["prompt"], p["rejected"]) for p in pairs]))  # fmt: skip

    assert 0.3 < agreement("train") < 0.7
    assert (0.3 < agreement("test") < 0.7) if test_is_a_coin else agreement("test") == 1.0


def frame(**means: float) -> pd.DataFrame:
    """Cells of ten replicates with these accuracies (`form_layer`) and a little noise."""
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        [
            {
                "task": f"r{i}",
                "seed": 0,
                "examples": 8,
                "form": form,
                "layer": layer,
                "base_accuracy": 0.5,
                "accuracy": means.get(f"{form}_{layer}", 0.5) + rng.normal(0, 0.01),
            }
            for i in range(10)
            for layer in ("right", "wrong")
            for form in planted.FORMS
        ]
    )


TASKS = [f"r{i}" for i in range(10)]


@pytest.mark.parametrize(
    ("problem", "means", "expected"),
    [
        # named, claimed, layer claimed, false claim
        ("bias", {"bias_right": 0.8, "bias_wrong": 0.7}, (True, True, True, False)),
        ("gated", {"gated_right": 0.8, "gated_wrong": 0.7}, (True, True, True, False)),
        ("bias", {"gated_right": 0.8, "gated_wrong": 0.7}, (False, False, True, True)),
        ("lora", {"bias_right": 0.8, "bias_wrong": 0.8}, (False, False, False, True)),
        ("bias", {"bias_wrong": 0.9}, (False, True, False, True)),
        ("base", {"lora_right": 0.9, "lora_wrong": 0.9}, (False, False, False, True)),
        ("base", {}, (False, False, False, False)),
        ("shuffled", {"lora_wrong": 0.6}, (False, False, False, True)),
        ("shuffled", {"lora_wrong": 0.4}, (False, False, False, False)),
    ],
)
def test_what_counts_as_a_claim(problem, means, expected):
    assert planted._study(problem, frame(**means), TASKS) == expected


def test_the_suite_runs_and_goes_on(tmp_path, capsys):
    words = ["--problems", "bias", "--replicates", "2", "--examples", "32", "--pairs", "2", "--folder", str(tmp_path)]
    assert planted.main(words) == 0
    printed = capsys.readouterr().out
    assert "| bias | 2 | 0." in printed and (tmp_path / "table.md").read_text() in printed
    cells = sorted(tmp_path.rglob("cell.json"))
    assert len(cells) == 12
    stamps = [file.stat().st_mtime_ns for file in cells]
    assert planted.main(words) == 0
    assert [file.stat().st_mtime_ns for file in cells] == stamps
