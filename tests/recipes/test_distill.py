"""Distilling a prompt: fidelity against a plain computation, what the run leaves behind, what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_data
import torch
from datasets import Dataset
from tiny_models import steered, tiny

from steertune.recipes import distill
from steertune.recipes.lab.arm import load_arm
from steertune.recipes.lab.evaluate import evaluate, evaluate_base
from steertune.recipes.lab.files import ArmError, read_rows
from steertune.recipes.lab.generation import check_context, prompt_lengths
from steertune.recipes.lab.ingredients.views import Views
from steertune.recipes.lab.measures import Seen
from steertune.recipes.lab.observe import HeldOut, Prompted
from steertune.recipes.lab.rows import Record
from steertune.trainers import get_view

ORDER = "you stay now "
VIEW = get_view("instruction", text=ORDER)
MEASURES = ["fidelity", "prompted_kl", "agreement"]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Overrides: a tiny local model and local pairs."""
    trainer = {"trainer.max_steps": 30, "trainer.learning_rate": 0.01}
    options = {"model.threads": 1, "views.good.text": ORDER, "evaluation.new_tokens": 6, **trainer}
    return tiny_data.save_run(tmp_path, 8, options, max_position_embeddings=256, vocab_size=22)


def fidelity_of(model, rows: Dataset, **options) -> Record:
    """The measures of a distilled prompt, of a model whose base is `tiny()` at answers that stand for the prompted
    model's."""
    held_out = HeldOut(tiny(), tiny_data.tokenizer(), rows, rows, prompted=Prompted(VIEW, rows), **options)
    keys = {"arm": "a", "task": "t", "examples": 1, "seed": 0}
    return Record(keys, {**evaluate_base(held_out, MEASURES), **evaluate(model, held_out, MEASURES)})


def test_fidelity_is_what_a_plain_loop_finds():
    model, tokenizer, rows = steered(layers=2).float(), tiny_data.tokenizer(), tiny_data.demonstrations(5)
    record = fidelity_of(model, rows, batch_size=2)

    def distributions(row, text, plain):
        ids = tokenizer(text + row["prompt"] + row["completion"])["input_ids"]
        answer = len(tokenizer(row["completion"])["input_ids"])
        with torch.no_grad(), model.disable_adapter() if plain else torch.no_grad():
            logits = model(torch.tensor([[*ids, tokenizer.eos_token_id]])).logits[0]
        return logits.log_softmax(-1)[-answer - 2 : -1]  # TRL ends completions

    kls, agreements = {True: [], False: []}, []
    for row in rows:
        prompted = distributions(row, ORDER.strip() + "\n\n", plain=True)
        for plain in (True, False):
            other = distributions(row, "", plain)
            kls[plain].append((prompted.exp() * (prompted - other)).sum(-1))
            if not plain:
                agreements.append((prompted.argmax(-1) == other.argmax(-1)).float())
    base, ours = (float(torch.cat(kls[plain]).mean()) for plain in (True, False))
    assert record.value("prompted_kl") == pytest.approx(base, rel=1e-4)
    assert record.value("prompted_kl", 1) == pytest.approx(ours, rel=1e-4)
    assert record.value("fidelity", 1) == pytest.approx(1 - ours / base, rel=1e-4)
    assert record.value("agreement", 1) == pytest.approx(float(torch.cat(agreements).mean()))


def test_the_prompted_model_itself_has_a_fidelity_of_one():
    rows = tiny_data.demonstrations(3)
    held_out = HeldOut(tiny(), tiny_data.tokenizer(), rows, rows, prompted=Prompted(VIEW, rows))
    behind = held_out.behind(lambda rows: Dataset.from_list([dict(row) for row in VIEW(rows.to_list())]))
    seen = Seen(evaluate(held_out.model, behind, MEASURES)["1"])
    assert [float(seen[name].mean()) for name in MEASURES] == pytest.approx([1, 0, 1], abs=1e-6)


def test_a_vector_of_zeros_is_as_far_as_the_base():
    model = steered(layers=2)
    torch.nn.init.zeros_(next(p for n, p in model.named_parameters() if "steering_vector_v" in n))
    record = fidelity_of(model, tiny_data.demonstrations(3))
    assert record.value("fidelity", 1) == pytest.approx(0, abs=1e-6)


def test_an_instruction_is_learnt_and_its_tokens_are_saved(words, tmp_path, capsys):
    assert distill.main(["vector_distillation", *words]) == 0
    run = tmp_path / "run"
    record, prompted = (Record.read(run / name) for name in ("result.json", "prompted.json"))
    assert record.value("fidelity", 1) > 0.3
    assert record.value("prompted_kl", 1) < record.value("prompted_kl")
    assert record.facts["tokens"]["saved"] == len(ORDER.split())
    assert prompted.value("fidelity", 1) == pytest.approx(1)
    assert record.seen().observations == prompted.seen().observations
    assert prompted.value("margin", 1) != prompted.value("margin")
    widths = [len(row.split("|")) for row in (run / "page.md").read_text().splitlines() if "|" in row]
    assert len({*widths}) == 2, "effect beside side effects with intervals, and every measure"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    answers = read_rows(run / "answers.jsonl", "")
    assert {len(row) for row in answers} == {2}
    assert 0 < len(answers) == record.facts["train_prompts"]
    assert "tokens saved" in capsys.readouterr().out
    assert distill.main(["vector_distillation", *words]) == 2
    assert "finished run" in capsys.readouterr().err


def test_an_interrupted_run_reads_its_answers(words, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "train_and_save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert distill.main(["vector_distillation", *words]) == 130
    before = (tmp_path / "run" / "answers.jsonl").read_text()
    monkeypatch.undo()
    monkeypatch.setattr(distill, "generate", lambda *_: pytest.fail("the answers are there"))
    assert distill.main(["vector_distillation", *words]) == 0
    assert (tmp_path / "run" / "answers.jsonl").read_text() == before


def test_a_contrast_prompt_shows_training_examples_in_front_of_test_prompts(words, tmp_path):
    words = [word for word in words if "views" not in word]
    arm = load_arm("vector_contrast_distillation", [*words, "--views.good.k=2", "--trainer.max_steps=2"])
    record = distill.run(arm)
    assert record.facts["tokens"]["saved"] > 15  # two demonstrations of a prompt and two answers
    train = tiny_data.pairs(8, seed=len("train"))
    pooled = distill._with_pool(arm, train).get(Views).views()["good"]
    [first, *_] = pooled(tiny_data.pairs(8, seed=len("test")).to_list())
    shown = [row for row in train if row["chosen"] in first["prompt"] and row["rejected"] in first["prompt"]]
    assert len(shown) >= 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--loss.name=dpo", "--views={}"], "does not learn from a prompt"),
        (["--views.good.name=neutral", "--views.good={name='neutral'}"], r"\[views.good\] is the prompt"),
        (["--trainer.max_steps=0"], "Distillation trains an adapter"),
        (["--adapter={type='none'}"], "Distillation trains an adapter"),
        (["--augmentation={name='templates'}"], r"has a table \[augmentation\]: distill makes no further examples"),
    ],
)
def test_bad_arms(words, changes, message):
    with pytest.raises(ArmError, match=message):
        distill.run(load_arm("vector_distillation", [*words, *changes], recipe="distill"))


def test_prompts_beyond_the_context_are_refused_before_anything(words):
    with pytest.raises(ArmError, match=r"the model reads 256"):
        distill.run(load_arm("vector_distillation", [*words, "--evaluation.new_tokens=300"]))


def test_test_pairs_beyond_the_context_are_refused_before_anything(words, tmp_path, monkeypatch):
    long = [{**row, "rejected": "sea " * 255} for row in tiny_data.pairs(8, seed=len("test"))]
    Dataset.from_list(long).to_json(tmp_path / "test.jsonl")
    monkeypatch.setattr(distill, "generate", lambda *_: pytest.fail("nothing is generated"))
    with pytest.raises(ArmError, match=r"test rows: a prompt and its answer take \d+ tokens, the model reads 256"):
        distill.run(load_arm("vector_distillation", words))


def test_the_longest_of_prompt_and_answer_counts():
    rows = {"prompt": ["the cat ", "a "], "chosen": ["runs", "dog"], "rejected": ["sits", "dog sits then runs now"]}
    model, pairs = tiny(max_position_embeddings=7), Dataset.from_dict(rows)
    check_context(model, tiny_data.tokenizer(), pairs, 5, "Pairs")  # 2 + 5 new ones; 1 + 5 and the end of the text
    with pytest.raises(ArmError, match="Pairs: a prompt and its answer take 8 tokens, the model reads 7"):
        check_context(model, tiny_data.tokenizer(), pairs, 6, "Pairs")
    model.config.max_position_embeddings = 6
    with pytest.raises(ArmError, match="take 7 tokens"):
        check_context(model, tiny_data.tokenizer(), pairs, 0, "Pairs")
    check_context(model, tiny_data.tokenizer(), pairs.select_columns("prompt"), 4, "Prompts")


def test_lengths_of_prompts_are_those_that_generate_asks():
    tokenizer = tiny_data.tokenizer()
    rows = tiny_data.conversational(tiny_data.demonstrations(2))
    assert prompt_lengths(tokenizer, ["the cat ", "a dog runs"]) == [2, 3]
    # <s> <user> ... </s> <assistant>
    assert prompt_lengths(tokenizer, rows["prompt"]) == [len(p[0]["content"].split()) + 4 for p in rows["prompt"]]


def test_demonstrations_that_are_test_rows_are_refused(words, tmp_path, capsys):
    rows = tiny_data.pairs(6, seed=3)
    changes = [
        "--data.name",
        tiny_data.save_task(tmp_path / "leaks", train=rows, test=rows),
        "--data.train",
        "6",
        "--data.test",
        "4",
    ]
    kept = [word for word in words if not word.startswith(("--views", "--data"))]
    assert distill.main(["vector_distillation", *kept, *changes, "--views.good={name='demonstrations', k=2}"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"test\.jsonl:\d, a held-out row, asks the same .* the training row", error)
