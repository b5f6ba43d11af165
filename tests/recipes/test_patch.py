"""A patch makes a fix, a monitor and a page, goes on where it stopped, and names bad input before any work."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_data import WORDS, save_model, tokenizer
from tiny_models import steered, tiny
from unlike_pairs import write

from steertune.adapters import monitors
from steertune.recipes import cli, patch
from steertune.recipes.lab.arm import load_arm
from steertune.recipes.lab.files import ArmError
from steertune.recipes.patching import corrections
from steertune.recipes.patching.case import CAUGHT, read_case
from steertune.recipes.patching.corrections import read_corrections, sample_corrections, write_corrections
from steertune.recipes.patching.policy import training_rows
from steertune.recipes.patching.watching import readable_layers

SAID = [word for word in WORDS if word != "sea"]
FAST = ["--false-positives", "0.1", "--threads", "1", "--trainer.max_steps", "2", "--evaluation.new_tokens", "3"]


def prompts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(SAID, k=5)) for _ in range(count)]


def catches(count: int = 3, seed: int = 1, corrected: bool = True) -> list[dict[str, str]]:
    rows = [{"prompt": prompt, "bad": "the sea runs"} for prompt in prompts(count, seed)]
    return [{**row, "corrected": "the dog sits"} for row in rows] if corrected else rows


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny model, catches, what is near and far, and innocent traffic."""
    folder = tmp_path_factory.mktemp("patch")
    save_model(folder / "model")
    innocent = [{"prompt": prompt, "completion": "now we stay"} for prompt in prompts(40, 2)]
    for name, rows in {
        "caught": catches(),
        "bare": catches(corrected=False),
        "near": catches(4, 3),
        "far": catches(4, 4, corrected=False),
        "innocent": innocent,
    }.items():
        write(folder / f"{name}.jsonl", rows)
    return folder


def words(home, caught: str = "caught", *more: str) -> list[str]:
    """A command line of these files."""
    given = ["patch", str(home / f"{caught}.jsonl"), "--innocent", str(home / "innocent.jsonl")]
    return [*given, "--model.name", str(home / "model"), *FAST, *more]


def case_of(home, caught: str = "caught", **changes):
    options = {"others": {}, "chat": lambda: True, "rate": 0.1}
    return read_case(str(home / f"{caught}.jsonl"), str(home / "innocent.jsonl"), **{**options, **changes})


@pytest.mark.slow
def test_a_patch_of_a_tiny_model(home, capsys, monkeypatch):
    tested = ["--near", str(home / "near.jsonl"), "--far", str(home / "far.jsonl"), "--bad-pattern", r"\bsea\b"]
    line = words(home, "caught", *tested, "--sizes", "1", "--folder", str(home / "run"))

    # interrupted once the first fix is done, it goes on and trains the other one only
    made = []
    real = patch.make_fix

    def once(context, count, folder):
        made.append(count)
        if made == [1, 3]:
            raise KeyboardInterrupt
        return real(context, count, folder)

    monkeypatch.setattr(patch, "make_fix", once)
    assert cli.main(line) == 130
    assert cli.main(line) == 0
    assert made == [1, 3, 3]
    page = capsys.readouterr().out
    for heading in ("Bad answers, before and after", "Harm to benign requests", "Strength", "The monitor",
                    "With fewer catches", "What was caught, and its corrections", "Use it"):  # fmt: skip
        assert f"## {heading}" in page, heading

    result = json.loads((home / "run" / "result.json").read_text())
    first, last = result["cells"]
    assert (first["count"], last["count"]) == (1, 3)
    assert {*last["records"]} == {"caught", "near", "far", "innocent"}
    assert "margin" not in last["records"]["far"]["observations"]["1"]  # no correction says what is better
    assert len(last["records"]["near"]["observations"]["1"]["chosen_logp"]) == 4
    assert {*last["records"]["near"]["observations"]} == {"0", "0.5", "1", "1.5"}
    assert last["watched"]["below"] and last["watched"]["layer"] < 2
    model = PeftModel.from_pretrained(tiny(), str(home / "run" / "adapter"))
    monitor = monitors.load(home / "run" / "monitor", model, patch.load_model(load_table(home))[1])
    assert monitor.threshold is not None and monitor.threshold.false_positive_rate == 0.1
    assert (home / "run" / "adapter" / "trained_on.json").exists()

    assert cli.main(line) == 2
    assert "holds a finished run" in capsys.readouterr().err


def load_table(home):
    return load_arm("vector_neutral_sft", ["--model.name", str(home / "model")]).model


@pytest.mark.slow
def test_missing_corrections_are_shown_before_anything_is_trained(home, capsys, monkeypatch):
    # a tiny random model says nothing, so its answers are given
    monkeypatch.setattr(corrections, "generate", lambda *_, **__: ["the dog sits now."])
    line = words(home, "bare", "--folder", str(home / "review"), "--sizes", "3", "--arm", "lora_neutral_sft")
    line += ["--instruction", "stay"]
    assert cli.main(line) == 0
    output = capsys.readouterr().out
    assert "the sea runs" in output and "the dog sits now." in output and "--accept" in output
    assert {file.name for file in (home / "review").iterdir()} == {"corrected.jsonl"}
    file = home / "review" / "corrected.jsonl"
    file.write_text(file.read_text().replace("sits now", "stays"))
    assert cli.main([*line, "--accept"]) == 0
    result = json.loads((home / "review" / "result.json").read_text())
    assert "the dog stays." in (home / "review" / "page.md").read_text()
    assert not result["cells"][-1]["watched"]["below"]  # a LoRA changes every layer


# -- parts --------------------------------------------------------------------------------------------------------


def test_the_first_answer_that_is_not_bad_is_the_correction(home, monkeypatch):
    said = {0: "", 1: "The sea, RUNS", 2: "we like the sea a lot.", 3: "cat " * 60, 4: "dog sits. Then we"}
    monkeypatch.setattr(corrections, "generate", lambda *_, seed=0, **__: [said[seed]])
    caught = case_of(home, "bare").caught
    found = sample_corrections(tiny(), tokenizer(), caught, "Be good.", 8, r"\bsea\b")
    assert found.corrections == [[{"role": "assistant", "content": "dog sits."}]] * 3
    monkeypatch.setattr(corrections, "generate", lambda *_, **__: ["the sea runs"])
    with pytest.raises(ArmError, match=r"bare.jsonl:1: the model gave no other answer .* 9 tries"):
        sample_corrections(tiny(), tokenizer(), caught, "Be good.", 8, None)


def test_corrections_can_be_changed_and_must_be_of_the_same_catches(home, tmp_path):
    caught = case_of(home).caught
    file = tmp_path / "corrected.jsonl"
    write_corrections(caught, file)
    assert read_corrections(caught, file, lambda: True).corrections == caught.corrections
    file.write_text(file.read_text().replace("the dog sits", "", 1))
    with pytest.raises(ArmError, match=r"corrected.jsonl:1 has no correction"):
        read_corrections(caught, file, lambda: True)
    with pytest.raises(ArmError, match="corrections of other catches"):
        read_corrections(replace(caught, rows=Dataset.from_list(caught.rows.to_list()[:2])), file, lambda: True)


def test_a_monitor_reads_below_a_vector_and_anywhere_beside_a_lora():
    # of 4 layers, those on offer are 1, 2 and 3
    assert readable_layers(steered(layers=2)) == ([1], True)
    assert readable_layers(steered(layers=1)) == ([1, 2, 3], False)
    assert readable_layers(steered(layers="all")) == ([1, 2, 3], False)
    lora = get_peft_model(tiny(), LoraConfig(target_modules="all-linear"))
    assert readable_layers(lora) == ([1, 2, 3], False)


def test_catches_are_repeated_to_as_many_rows_as_the_steps_take():
    arm = load_arm("vector_neutral_sft", ["--trainer.max_steps", "5", "--trainer.per_device_train_batch_size", "4"])
    assert training_rows(arm, [{"n": 0}, {"n": 1}, {"n": 2}])[:5] == [{"n": n} for n in (0, 1, 2, 0, 1)]
    assert len(training_rows(arm, [{"n": 0}])) == 20
    endless = load_arm("vector_neutral_sft", ["--trainer.max_steps", "-1"])
    assert len(training_rows(endless, [{"n": 0}])) == 1


def test_sizes_are_numbers_of_catches(home):
    assert case_of(home).sizes == [1, 3]
    assert case_of(home, sizes=[2]).sizes == [2, 3]
    with pytest.raises(ArmError, match="--sizes 9: there are 3 catches"):
        case_of(home, sizes=[9])


def test_a_case_is_its_rows_and_its_corrections(home):
    first, same = case_of(home), case_of(home)
    assert first.digest() == same.digest() != case_of(home, rate=0.2).digest()
    other = replace(first.caught, corrections=[*first.caught.corrections[:-1], "now"])
    assert replace(first, groups={CAUGHT: other}).digest() != first.digest()


# -- bad input ----------------------------------------------------------------------------------------------------


def test_what_a_case_refuses(home, tmp_path):
    def refused(says: str, rows, **changes) -> None:
        file = write(tmp_path / "rows.jsonl", rows)
        options = {"innocent": str(home / "innocent.jsonl"), "others": {}, "chat": lambda: True, "rate": 0.1}
        with pytest.raises(ValueError, match=says):
            read_case(file, **{**options, **changes})

    refused("has 17 transcripts, but a patch is made from 1 to 16", catches(17, 5))
    refused("There is no innocent traffic", catches(), innocent=None)
    refused(r"rows.jsonl:2 is the same as .*rows.jsonl:1", [catches()[0], catches()[0]])
    refused(
        r"near.jsonl:1 \(to test near\) is the catch .*rows.jsonl:1, or nearly the same", catches(1, 3),
        others={"near": str(home / "near.jsonl")},
    )  # fmt: skip
    line = json.loads((home / "innocent.jsonl").read_text().splitlines()[7])
    refused(
        "rows.jsonl:1, a bad transcript, is also in the innocent traffic.*innocent.jsonl:8",
        [{"prompt": line["prompt"], "bad": line["completion"]}],
    )
    refused("innocent rows cannot resolve a false-positive rate of 0.001, 1 in 1000: 999", catches(), rate=0.001)
    few = write(tmp_path / "few.jsonl", [{"prompt": "we go", "completion": "now"}] * 3)
    refused("too few to hold any out", catches(), innocent=few)
    refused("does not find the bad answer of .*rows.jsonl:1", catches(), pattern="blue")
    refused("also finds the corrected answer of .*rows.jsonl:1", catches(), pattern="sea|dog")
    refused("is not a regular expression", catches(), pattern="(")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--arm", "nothing"], "No arm 'nothing'"),
        (["--arm", "prompt_instruction"], "prompt"),
        (["--method", "svm"], "method='svm' is not one of"),
        (["--pooling", "maxx"], "Did you mean 'max'"),
        (["--adapter.layers", "9"], "layer 9 does not exist"),
        (["--adaptr.layers", "1"], "Did you mean --adapter.layers"),
    ],
)
def test_what_is_refused_before_the_model_is_loaded(home, capsys, monkeypatch, more, says):
    monkeypatch.setattr("steertune.recipes.patch.load_model", lambda table: pytest.fail("the model is loaded"))
    assert cli.main([*words(home), *more, "--folder", str(home / "none")]) == 2
    assert says in capsys.readouterr().err
    assert not (home / "none").exists()


def test_transcripts_are_data(home, tmp_path):
    """Markup in a transcript is shown, and is not markup of the page."""
    row = {"prompt": "the <script>alert(1)</script> cat", "bad": "the sea", "corrected": "[x](http://evil) | `dog`"}
    case = case_of(home)
    given = read_case(write(tmp_path / "rows.jsonl", [row]), str(home / "innocent.jsonl"), {}, lambda: True, 0.1)
    from steertune.recipes.lab.pages import Page, Section, html, markdown
    from steertune.recipes.patching.page import _corrections

    page = Page("A patch", [Section("Caught", _corrections(given))])
    assert "<script>" not in html(page, tmp_path) + markdown(page)
    assert "href" not in html(page, tmp_path).partition("Caught")[2]
    assert case.sizes == [1, 3]
