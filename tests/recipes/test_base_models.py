"""Every recipe runs on a base model without a chat template, and on one file of pairs in repeng's columns."""

from __future__ import annotations

import importlib
import io
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tiny_data
from tiny_models import tiny
from transformers import AutoModelForCausalLM

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
from steertune.recipes.lab import trained_on
from steertune.recipes.lab.held_out import held_out_rows
from steertune.recipes.lab.rows import Record
from steertune.recipes.studies import gradients, probes
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


APART = {"positive": "cat", "negative": "dog"}
DRAWN: list[dict[str, str]] = tiny_data.pairs(50, seed=50).to_list()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, 50 pairs of whole texts in pairs.jsonl, the same with prompts of their own in
    prompts.jsonl, and a trained vector in run/."""
    home = tmp_path_factory.mktemp("base")
    tiny(max_position_embeddings=512).save_pretrained(home / "model")
    tiny_data.tokenizer(template=None).save_pretrained(home / "model")
    # answers differ in their last word, which a vector can make likelier
    pairs = [{**row, "chosen": f"{row['chosen']} cat", "rejected": f"{row['chosen']} dog"} for row in DRAWN]
    # a tenth of the pairs differ from their first word on, so they have no prompt
    texts = [{side: f"{text} {row['chosen']}" for side, text in APART.items()} if i % 10 == 0 else repeng(row)
             for i, row in enumerate(pairs)]  # fmt: skip
    write(home / "pairs.jsonl", texts)
    write(home / "prompts.jsonl", [{"prompt": row["prompt"], **repeng({**row, "prompt": ""})} for row in pairs])
    assert train.main(["vector_dpo", *arm_words(home, "run")]) == 0
    return home


def repeng(row: dict[str, str]) -> dict[str, str]:
    """A pair in repeng's columns."""
    return {"positive": row["prompt"] + row["chosen"], "negative": row["prompt"] + row["rejected"]}


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arm_words(home: Path, folder: str, data: str = "pairs.jsonl") -> list[str]:
    options = {
        "model.name": home / "model",
        "model.threads": 1,
        "data.name": home / data,
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


@pytest.mark.parametrize("arm", ["vector_dpo", "vector_ce"])
def test_train_reads_conversations_as_plain_text(home: Path, tmp_path: Path, arm: str) -> None:
    """Pairs of messages, and rows of whole conversations."""
    pairs = [{part: message(part, text) for part, text in row.items()} for row in DRAWN]
    whole = [{"messages": [*row["prompt"], *row["chosen"]]} for row in pairs]
    write(tmp_path / "rows.jsonl", pairs if arm == "vector_dpo" else whole)
    options = ["--data.name", str(tmp_path / "rows.jsonl"), "--output.folder", str(tmp_path / "run")]
    assert train.main([arm, *arm_words(home, "unused"), *options, "--evaluation.generations", "0"]) == 0
    assert Record.read(tmp_path / "run" / "result.json").facts["held_out"] == 8


def message(part: str, text: str) -> list[dict[str, str]]:
    return [{"role": "user" if part == "prompt" else "assistant", "content": text.strip()}]


def test_the_page_and_the_card_say_how_the_file_was_divided(home: Path) -> None:
    for page in (home / "run" / "page.md", home / "run" / "adapter" / "README.md"):
        assert "is one file of 50 rows, divided by a hash of the text" in page.read_text()
    held_out, note = held_out_rows(str(home / "pairs.jsonl"), [home / "run" / "adapter"])
    assert 8 <= len(held_out) < 20 and "divided by a hash" in note


@pytest.mark.parametrize(
    ("begin", "asked"),
    [({"prompt": "the cat runs "}, "training"), ({"chosen": "cat sits", "rejected": "dog sits"}, "neutral")],
)
def test_five_rows_are_trained_on_and_none_is_held_out(
    home: Path, tmp_path: Path, begin: dict[str, str], asked: str
) -> None:
    pairs = [{"prompt": "", **row} for row in tiny_data.pairs(5).remove_columns("prompt").to_list()]
    whole = [repeng({**pair, **begin}) for pair in pairs]
    write(
        tmp_path / "five.jsonl", [{side: f"{text} {i}" for side, text in row.items()} for i, row in enumerate(whole)]
    )
    options = ["--data.name", str(tmp_path / "five.jsonl"), "--output.folder", str(tmp_path / "run")]
    assert train.main(["vector_dpo", *arm_words(home, "unused"), *options]) == 0
    record = Record.read(tmp_path / "run" / "result.json")
    assert record.facts["held_out"] == 0 and record.facts["asked"] == asked
    assert len(record.observations["1"]["answer"]) == len(record.facts["prompts"]) >= 3
    page = (tmp_path / "run" / "page.md").read_text()
    assert "**No rows were held out" in page.splitlines()[2]
    assert f"Generations (greedy, {asked} prompts)" in page


def test_sweep(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(home / "pairs.jsonl"), "--model", str(home / "model"), "--layers", "1", "2", "--strengths", "4", "64"]
    sizes = ["--train", "8", "--validation", "6", "--test", "8", "--generations", "2", "--new-tokens", "4"]
    limits = ["--max-kl", "9", "--max-perplexity", "99", "--max-repetition", "1"]
    assert sweep.main([*words, *sizes, *limits, "--threads", "1", "--folder", str(home / "sweep")]) == 0
    assert "Every setting (validation rows)" in capsys.readouterr().out
    assert trained_on.read(home / "sweep" / "adapter")


def test_distillation_names_rows_without_a_prompt(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill.main(["vector_distillation", *arm_words(home, "refused")]) == 2
    error = capsys.readouterr().err
    assert "distillation answers prompts, but some rows have an empty one" in error and "data.columns.prompt" in error
    assert not (home / "refused").exists()


@pytest.mark.parametrize("arm", ["vector_distillation", "vector_demonstrations_distillation"])
def test_distill(home: Path, arm: str) -> None:
    assert distill.main([arm, *arm_words(home, arm, "prompts.jsonl")]) == 0
    page = (home / arm / "page.md").read_text()
    assert "Fidelity" in page and "is one file of 50 rows, divided by a hash of the prompt" in page
    assert trained_on.read(home / arm / "adapter")


@pytest.mark.slow
def test_ablate_and_report(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = tomllib.loads(GRID)
    assert tables["name"] == "base"
    scorer = '{ kind = "classifier" }'
    name = home / "pairs.jsonl"
    task = f'tasks = [{{ name = "{name}", instructions = ["say red"], instructions_by = "the test", scorer = '
    model = f'model = {{ name = "{home / "model"}", threads = 1 }}\n'
    (tmp_path / "grid.toml").write_text(f"{task}{scorer} }}]\n{model}{GRID}")
    words = [str(tmp_path / "grid.toml"), "--folder", str(tmp_path / "grid"), "--threads", "1"]
    assert ablate.main([*words, "--dry-run"]) == 0
    assert "cells: 5 arms" in capsys.readouterr().out
    assert not (tmp_path / "grid").exists(), "a dry run leaves nothing"
    assert ablate.main(words) == 0
    assert report.main([str(tmp_path / "grid")]) == 0


@pytest.mark.parametrize("recipe", ["train", "distill", "sweep", "eval", "vectors", "ablate"])
def test_bad_data_are_refused_before_the_model_is_loaded(
    home: Path, tmp_path: Path, recipe: str, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    bad, adapter, model = tmp_path / "bad.csv", str(home / "run" / "adapter"), ["--model", str(home / "model")]
    bad.write_text("question,good,rejected\nWhy?,So.,No.\n")
    grid = GRID.replace('name = "base"', f'name = "base"\ntasks = ["{bad}"]\nmodel = {{ name = "{home / "model"}" }}')
    (tmp_path / "grid.toml").write_text(grid.replace('"prompt_both", ', ""))
    words = {
        "train": [*arm_words(home, "refused"), "--data.name", str(bad)],
        "distill": ["vector_distillation", *arm_words(home, "refused"), "--data.name", str(bad)],
        "sweep": [str(bad), *model],
        "eval": [adapter, *model, "--tasks", str(bad)],
        "vectors": ["together", adapter, adapter, "--data", str(bad), str(bad), *model],
        "ablate": [str(tmp_path / "grid.toml"), "--folder", str(tmp_path / "grid")],
    }[recipe]
    if recipe == "eval":
        pytest.importorskip("lm_eval")
    assert importlib.import_module(f"steertune.recipes.{recipe}").main(words) == 2
    assert "--columns prompt=question chosen=good rejected=rejected" in capsys.readouterr().err


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
    assert recipe.main([*words, "--tasks", str(home / "pairs.jsonl")]) == 0
    printed = capsys.readouterr()
    assert "divided by a hash of the text" in printed.err, "the rows are those that no recipe trains on"
    numbers = json.loads(printed.out)
    assert set(numbers) == {"0", "1"} and 0 <= numbers["1"]["pairs"]["acc,none"] <= 1


def test_merged_exports_are_served_as_they_are(home: Path, tmp_path: Path, verified_here: None) -> None:
    from transformers import AutoTokenizer

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
    pairs, adapter = str(home / "pairs.jsonl"), home / "run" / "adapter"
    other = home / "other"
    if not other.exists():
        assert vectors(["add", str(adapter), "--weights", "0.5", "--output", str(other)]) == 0
    words = ["together", str(adapter), str(other), "--data", pairs, pairs, "--rows", "6", "--threads", "1"]
    assert vectors([*words, "--model", str(home / "model")]) == 0
    assert "On pairs" in capsys.readouterr().out


def test_contrast_prompts(home: Path, tmp_path: Path) -> None:
    other = tiny_data.save_task(
        tmp_path / "other", train=tiny_data.pairs(24, seed=124), test=tiny_data.pairs(8, seed=108)
    )
    (tmp_path / "mixture.toml").write_text(
        f'seen = ["{home / "pairs.jsonl"}"]\nunseen = ["{other}"]\narm = "vector_dpo"\nsteering = ["vector_dpo"]\n'
        f'model = {{ name = "{home / "model"}" }}\ndemonstrations = 2\nexamples = 8\npairs = 4\nseeds = [0]\n'
        "trainer = { max_steps = 2 }\nsplits = { validation = 2, scorer = 0, test = 6, near_duplicates = 1.0 }\n"
    )
    assert contrast_prompts.main([str(tmp_path / "mixture.toml"), "--folder", str(tmp_path / "study")]) == 0
    assert (tmp_path / "study" / "page.md").is_file()


def test_probes_read_conversations_as_text(home: Path, tmp_path: Path) -> None:
    train, test = (tiny_data.conversational(tiny_data.pairs(rows, seed=rows)) for rows in (16, 8))
    tiny_data.save_task(tmp_path, train=train, test=test)
    words = [str(tmp_path), "--model", str(home / "model"), "--train", "16", "--test", "8", "--threads", "1"]
    assert probes.main([*words, "--methods", "mean_difference", "--folder", str(tmp_path / "probes")]) == 0


def test_probes_and_gradients_read_one_file(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, model = str(home / "pairs.jsonl"), ["--model", str(home / "model"), "--threads", "1"]
    assert probes.main([data, *model, "--methods", "mean_difference", "--folder", str(tmp_path / "probes")]) == 0
    held_out, _ = held_out_rows(data, [home / "run" / "adapter"])
    assert f"{len(held_out)} test pairs." in (tmp_path / "probes" / "table.md").read_text()

    words = [data, *model, "--batch", "2", "--folder", str(tmp_path / "gradients")]
    assert gradients.main([*words, "--pairs", "4", "--held-out", "40"]) == 2
    assert f"there are {len(held_out)}. `pairs.jsonl` is one file of 50 rows" in capsys.readouterr().err
    assert gradients.main([*words, "--pairs", "8", "--held-out", "4"]) == 0


def test_probes_of_five_rows_are_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "five.jsonl", [repeng(row) for row in DRAWN[:5]])
    assert probes.main([str(tmp_path / "five.jsonl"), "--model", str(home / "model"), "--threads", "1"]) == 2
    assert "too few to hold any out" in capsys.readouterr().err
