"""lm-eval on a steered model: strength 0 is the base model, strength 1 the trained one, on a tiny local task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_data
from measuring import margins
from tiny_data import saved_on_its_base
from tiny_models import steered, tiny

from steertune.adapters import set_strength
from steertune.recipes import cli
from steertune.recipes import eval as recipe
from steertune.recipes.lab.files import ArmError

pytest.importorskip("lm_eval", reason='pip install "steertune[eval]"')
TASK = Path(__file__).parent / "lm_eval_task"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved adapter, its base with a tokenizer beside it."""
    # lm-eval cuts the vocabulary to the tokenizer's where it loads an adapter (`peft=`): let them be of one size
    sizes = {"max_position_embeddings": 128, "vocab_size": len(tiny_data.tokenizer())}
    return saved_on_its_base(tmp_path_factory.mktemp("eval"), **sizes)


def numbers(plain):
    """lm-eval's metrics of the tiny task, within rounding."""
    row = plain["results"]["tiny"].items()
    return pytest.approx({k: v for k, v in row if "," in k and isinstance(v, float)}, rel=1e-4)


def test_strength_0_is_the_base_and_1_the_export_that_needs_no_plug_in(
    folder, tmp_path, monkeypatch, capsys, verified_here
):
    """Against lm-eval's own loading: of the base model, and of stock PEFT's export of the vector."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(TASK)
    words = ["eval", str(folder), "--tasks", "tiny.yaml", "--strengths", "0", "1", "-2", "--json"]
    assert cli.main([*words, "--output", str(tmp_path / "numbers.json")]) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])
    assert json.loads((tmp_path / "numbers.json").read_text()) == found and list(found) == ["0", "1", "-2"]
    assert cli.main(["export", str(folder), "--to", "peft", "--output", str(tmp_path / "stock")]) == 0
    for strength, extra in (("0", {}), ("1", {"peft": str(tmp_path / "stock")})):
        plain = simple_evaluate(
            "hf",
            {"pretrained": str(folder.parent / "base"), "device": "cpu", "dtype": "float32", **extra},
            tasks=["tiny.yaml"],
            task_manager=TaskManager(include_defaults=False),
            log_samples=False,
        )
        assert found[strength]["tiny"] == numbers(plain), strength
    assert found["0"]["tiny"]["perplexity,none"] != found["1"]["tiny"]["perplexity,none"]


def test_lm_evals_own_steered_model_reads_our_file(folder, tmp_path, monkeypatch, capsys, verified_here):
    """Two vectors in one file."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(TASK)
    assert cli.main(["export", str(folder), "--to", "lm_eval", "--output", str(tmp_path / "out")]) == 0
    plain = simple_evaluate(
        "steered",
        {
            "pretrained": str(folder.parent / "base"),
            "steer_path": str(tmp_path / "out" / "steer.pt"),
            "device": "cpu",
            "dtype": "float32",
        },
        tasks=["tiny.yaml"],
        task_manager=TaskManager(include_defaults=False),
        log_samples=False,
    )
    assert cli.main(["eval", str(folder), "--tasks", "tiny.yaml", "--strengths", "1", "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.rindex('{\n "1"') :])["1"]["tiny"]
    assert found == numbers(plain)


def test_pairs_are_a_choice_between_two_answers(folder, tmp_path):
    """Its accuracy is that of margins, here on prompts and answers without an end token behind them."""
    rows = tiny_data.pairs(24)
    rows.to_json(tmp_path / "mine.jsonl")
    words = tiny_data.tokenizer()
    model = steered(tiny(max_position_embeddings=128), layers=2)
    found = recipe.evaluate(model, words, [str(tmp_path / "mine.jsonl")], [0.0, 2.0], batch_size=4)
    for strength in (0.0, 2.0):
        with set_strength(model, strength):
            right = [_likelier(model, words, row) for row in rows]
        assert found[f"{strength:g}"]["mine"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert found["0"] != found["2"]
    assert len(margins(model, words, rows)) == 24  # the same rows suit the other measure
    lines = recipe.table(found).splitlines()
    assert lines[0].split() == ["task", "metric", "strength", "0", "strength", "2"]
    assert lines[1].startswith("mine  acc ") and " ± " in lines[1]


def _likelier(model, words, row) -> bool:
    import torch

    values = []
    for answer in (row["chosen"], row["rejected"]):
        prompt, whole = (words(text)["input_ids"] for text in (row["prompt"], row["prompt"] + answer))
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        values.append(sum(float(logps[i - 1, whole[i]]) for i in range(len(prompt), len(whole))))
    return values[0] > values[1]


def test_what_cannot_be_evaluated_is_refused(folder, tmp_path, capsys, monkeypatch):
    assert cli.main(["eval", str(folder), "--tasks", "nowhere.yaml"]) == 2
    assert "does not exist" in capsys.readouterr().err
    tiny_data.demonstrations().to_json(tmp_path / "rows.jsonl")
    assert cli.main(["eval", str(folder), "--tasks", str(tmp_path / "rows.jsonl")]) == 2
    assert "['chosen', 'rejected'] missing" in capsys.readouterr().err
    with pytest.raises(ArmError, match=r"positions=\['completion'\]"):
        recipe.evaluate(steered(layers=2, positions="completion"), tiny_data.tokenizer(), ["cautious_advice"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ArmError, match=r"steertune\[eval\]"):
        recipe.check_installed()


@pytest.mark.slow
def test_an_unknown_name_gets_the_nearest(folder, capsys):
    """Reading lm-eval's own index takes seconds."""
    assert cli.main(["eval", str(folder), "--tasks", "cautious_advise"]) == 2
    assert "Did you mean 'cautious_advice'" in capsys.readouterr().err
