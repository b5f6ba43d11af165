"""Planted problems: the data are the teacher's, and the studies are counted as they should be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steertune.recipes.ablation.grid import make_grid
from steertune.recipes.ablation.statistics.rows import examples_of
from steertune.recipes.lab.intervals import rate
from steertune.recipes.studies import planted
from steertune.recipes.studies.planting import FORMS
from steertune.recipes.studies.planting.studies import Study, read_study
from steertune.recipes.studies.planting.teachers import make_teacher, save_base, write_task


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "base"
    save_base(folder)
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


def raised_more(teacher, model, tokenizer, pair: dict) -> bool:
    """Whether the teacher's change makes the chosen answer likelier than the rejected one."""
    chosen, rejected = (
        logp(teacher, tokenizer, pair["prompt"], pair[side]) - logp(model, tokenizer, pair["prompt"], pair[side])
        for side in ("chosen", "rejected")
    )
    return chosen > rejected


@pytest.mark.parametrize("problem", FORMS)
def test_chosen_is_what_the_teacher_s_change_makes_likelier(problem, base, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    write_task(tmp_path, model, problem, seed=3, train=20, test=20)
    teacher = make_teacher(model, problem, 3)
    assert all(raised_more(teacher, model, tokenizer, pair) for pair in rows(tmp_path / "test.jsonl")[:20])


@pytest.mark.parametrize(("problem", "test_is_a_coin"), [("base", True), ("shuffled", False)])
def test_labels_without_a_teacher_are_a_coins(problem, test_is_a_coin, base, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    write_task(tmp_path, model, problem, seed=5, train=60, test=60)
    teacher = make_teacher(model, "bias", 5)

    def agreement(split: str) -> float:
        pairs = rows(tmp_path / f"{split}.jsonl")[:60]
        return float(np.mean([raised_more(teacher, model, tokenizer, pair) for pair in pairs]))

    assert 0.3 < agreement("train") < 0.7
    assert (0.3 < agreement("test") < 0.7) if test_is_a_coin else agreement("test") == 1.0


def made_up(problem: str, base: Path, **means: float) -> Study:
    """What a study says whose arms (`form_layer`) have these accuracies, with a little noise by seed and row."""
    grid = make_grid(planted.tables(problem, base, ["t0", "t1"]))
    rng = np.random.default_rng(0)
    cells = []
    for task in ("t0", "t1"):
        hard = rng.permutation(planted.TEST)
        for seed in range(planted.SEEDS):
            for arm in grid.arms:
                mean = means.get(f"{arm.levels['form']}_{arm.levels['layer']}", 0.5) + rng.normal(0, 0.01)
                ranks = (hard + rng.normal(0, 2, planted.TEST)).argsort().argsort()
                margins = np.where(ranks < planted.TEST * mean, 1.0, -1.0)
                cells.append({
                    "task": task, "seed": seed, "examples": planted.EXAMPLES, "arm": arm.name, **arm.levels,
                    "accuracy@0": 0.5, "accuracy@matched": float((margins > 0).mean()),
                    examples_of("accuracy@matched"): (margins > 0).astype(float),
                })  # fmt: skip
    return read_study(problem, grid, pd.DataFrame(cells))


@pytest.mark.parametrize(
    ("problem", "means", "named", "form", "layer", "side", "false"),
    [
        ("bias", {"bias_right": 0.8, "bias_wrong": 0.7}, True, True, True, "for", False),
        ("gated", {"gated_right": 0.8, "gated_wrong": 0.7}, True, True, True, "for", False),
        ("bias", {"gated_right": 0.8, "gated_wrong": 0.7}, False, False, True, "undecided", True),
        ("lora", {"bias_right": 0.8, "bias_wrong": 0.8}, False, False, False, "against", True),
        ("bias", {"bias_wrong": 0.9}, False, True, False, "undecided", True),
        ("base", {"lora_right": 0.9, "lora_wrong": 0.9}, False, False, False, "against", True),
        ("base", {}, False, False, False, "undecided", False),
        ("shuffled", {"lora_wrong": 0.7}, False, False, False, "against", True),
    ],
)
def test_what_a_study_says(problem, means, named, form, layer, side, false, base):
    found = made_up(problem, base, **means)
    assert (found.named or problem not in FORMS, found.form, found.layer, found.side, any(found.false)) == (
        named or problem not in FORMS, form, layer, side, false
    )  # fmt: skip
    assert found.base == 0.5 and set(found.gaps) == {"form gated", "form lora", "layer wrong"}


def test_rates_come_with_their_own_uncertainty():
    assert rate([False] * 24) == "0% [0%, 14%]"


@pytest.mark.slow
def test_the_suite_runs_and_goes_on(tmp_path, capsys, monkeypatch):
    for name, value in (("TASKS", 1), ("SEEDS", 2), ("TEST", 8), ("EXAMPLES", 8)):
        monkeypatch.setattr(planted, name, value)
    words = ["--problems", "base", "--nulls", "1", "--folder", str(tmp_path)]
    assert planted.main(words) == 0
    printed = capsys.readouterr().out
    assert "| base | 1 | 0." in printed and (tmp_path / "table.md").read_text() in printed
    cells = sorted(tmp_path.rglob("cell.json"))
    assert len(cells) == 12
    stamps = [file.stat().st_mtime_ns for file in cells]
    assert planted.main(words) == 0
    assert [file.stat().st_mtime_ns for file in cells] == stamps
