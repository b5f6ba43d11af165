"""Monitors are fitted, chosen and tested on rows that are apart, and bad input is named."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
from datasets import Dataset
from tiny_data import WORDS, save_model
from unlike_pairs import write

from steertune.adapters import monitors
from steertune.recipes import cli
from steertune.recipes.lab import embedded
from steertune.recipes.lab.detection import auroc, auroc_difference, detection, drift, share
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.monitor_data import gather
from steertune.recipes.lab.monitoring import folds_of, groups_of
from steertune.recipes.lab.transcripts import read_transcripts

SAID = [word for word in WORDS if word != "sea"]
FAST = ["--methods", "lda", "--layers", "1", "2", "--false-positives", "0.1", "--threads", "1"]


def rows(count: int, seed: int, word: str = "") -> list[dict[str, str]]:
    """Prompts of 5 words; answers of 4, one of which is `word`."""
    draw = random.Random(seed)
    given = []
    for _ in range(count):
        answer = draw.choices(SAID, k=4)
        if word:
            answer[draw.randrange(4)] = word
        given.append({"prompt": " ".join(draw.choices(SAID, k=5)), "completion": " ".join(answer)})
    return given


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny model, bad rows that say "sea", and innocent rows that do not."""
    folder = tmp_path_factory.mktemp("monitor")
    save_model(folder / "model")
    write(folder / "bad.jsonl", rows(24, 1, "sea"))
    write(folder / "innocent.jsonl", rows(60, 2))
    return folder


def told(capsys, *words: str) -> str:
    assert cli.main([*words]) == 2
    return capsys.readouterr().err


# -- statistics ---------------------------------------------------------------------------------------------------


def test_the_interval_of_an_area_holds_the_true_one():
    draw, inside, truth = np.random.default_rng(0), 0, 0.921  # of normal scores two standard deviations apart
    for _ in range(200):
        scores = np.concatenate([draw.normal(2, 1, 10), draw.normal(0, 1, 60)])
        one = auroc(scores, np.repeat([True, False], [10, 60]))
        inside += one.low <= truth <= one.high
    assert 180 <= inside <= 199


def test_a_perfect_area_of_few_rows_is_not_certain():
    few = auroc([3.0, 2.0, 1.0, 0.0], [True, True, False, False])
    many = auroc([*range(200)], np.arange(200) >= 100)
    assert few.estimate == many.estimate == few.high == 1 and few.low < 0.6 and 0.94 < many.low < 1
    assert auroc([0.0, 1.0], [True, False]).low == 0 and np.isinf(auroc([1.0], [True]).high)
    assert auroc([0.0, 0.0, 0.0], [True, False, False]).estimate == 0.5


def test_the_difference_of_two_areas_on_the_same_rows():
    draw, bad = np.random.default_rng(1), np.arange(100) < 20
    better = np.where(bad, 3.0, 0.0) + draw.normal(size=100)
    noise = draw.normal(size=100)
    gap = auroc_difference(better, noise, bad)
    assert gap.low > 0.2 and gap.estimate == pytest.approx(auroc(better, bad).estimate - auroc(noise, bad).estimate)
    assert not auroc_difference(noise, noise + 0.01 * draw.normal(size=100), bad).excludes_zero


def test_recall_and_false_positives_are_those_of_the_threshold():
    found = detection([0.9, 0.2, 0.8, 0.1, 0.0], [True, True, False, False, False], 0.5, lambda score: score)
    assert (found.recall.estimate, found.false_positives.estimate) == (0.5, pytest.approx(1 / 3))
    assert found.brier == pytest.approx(np.mean([0.1**2, 0.8**2, 0.8**2, 0.1**2, 0.0]))
    assert np.isnan(share([]).estimate)


def test_drift_is_seen_where_scores_move_and_not_where_they_do_not():
    draw = np.random.default_rng(0)
    before = draw.normal(size=300).tolist()
    assert drift(before, draw.normal(size=300).tolist(), 2.0).p > 0.01
    moved = drift(before, (draw.normal(size=300) + 1).tolist(), 2.0)
    assert moved.p < 1e-6 and moved.shift == pytest.approx(1, abs=0.2)
    assert moved.flagged[1].estimate > moved.flagged[0].estimate
    with pytest.raises(ValueError, match="2 rows or more"):
        drift([1.0], before, 2.0)


# -- rows ---------------------------------------------------------------------------------------------------------


def test_near_duplicates_share_a_fold_and_every_fold_leaves_out_bad_rows():
    given = rows(12, 3)
    given += [{**row, "prompt": row["prompt"].upper()} for row in given[:4]]
    bad = np.array([True] * 6 + [False] * 6 + [False] * 4)
    folds = folds_of(Dataset.from_list(given), bad)
    assert (folds[:4] == folds[12:]).all()
    assert {*folds.tolist()} == {*range(5)} == {*folds[bad].tolist()}
    assert len({*groups_of(given, "prompt").tolist()}) == 12


def test_a_single_bad_row_is_never_left_out():
    bad = np.array([True] + [False] * 11)
    folds = folds_of(Dataset.from_list(rows(12, 4)), bad)
    assert folds[0] == -1 and (folds[1:] >= 0).all()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "the cat", "bad": "sits", "corrected": "runs"},
        {"prompt": "the cat", "rejected": "sits", "chosen": "runs"},
        {"question": "the cat", "completion": "sits", "correction": "runs"},
        {
            "messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sits"}],
            "corrected": "runs",
        },
    ],
)
def test_transcripts_in_every_form(tmp_path, row):
    read = read_transcripts(write(tmp_path / "rows.jsonl", [row]), "bad", lambda: True)
    message = [{"role": "assistant", "content": "sits"}]
    assert read.rows[0] == {"prompt": [{"role": "user", "content": "the cat"}], "completion": message}
    assert read.corrections == [[{"role": "assistant", "content": "runs"}]] and read.bad == [True]


def test_some_rows_may_have_a_correction(tmp_path):
    given = [{"prompt": "a", "bad": "b", "corrected": None}, {"prompt": "c", "bad": "d", "corrected": "e"}]
    read = read_transcripts(write(tmp_path / "rows.jsonl", given), "bad", lambda: False)
    assert read.corrections == [None, " e"] and read.rows[1] == {"prompt": "c", "completion": " d"}


def test_corrections_count_as_innocent_rows_and_stay_with_their_prompt(home, tmp_path):
    given = [{**row, "bad": row["completion"], "corrected": "the dog runs"} for row in rows(24, 1, "sea")]
    bad = read_transcripts(write(tmp_path / "rows.jsonl", given), "bad", lambda: True, {"completion": "bad"})
    innocent = read_transcripts(str(home / "innocent.jsonl"), "innocent", lambda: True)
    samples = gather([bad, innocent], [], 0.1)
    assert samples.train.bad.sum() + samples.test.bad.sum() == 24
    prompts = [{json.dumps(row["prompt"]) for row in part.rows} for part in (samples.train, samples.test)]
    assert not prompts[0] & prompts[1]
    assert len(samples.train.rows) + len(samples.test.rows) == 2 * 24 + 60


@pytest.mark.parametrize(
    ("row", "kind", "says"),
    [
        ({"prompt": "a"}, "bad", "has no answer .*prompt and bad"),
        ({"prompt": "a", "completion": ""}, "bad", "rows.jsonl:1: its answer is empty"),
        ({"prompt": "a", "completion": "b"}, "labelled", "does not say which rows are bad"),
        ({"prompt": "a", "completion": "b", "bad": 3}, "labelled", "rows.jsonl:1: its label is 3"),
        ({"messages": [{"role": "user", "content": "a"}]}, "bad", "rows.jsonl:1: messages must be"),
    ],
)
def test_rows_that_are_no_transcripts(tmp_path, row, kind, says):
    with pytest.raises(ArmError, match=says):
        read_transcripts(write(tmp_path / "rows.jsonl", [row]), kind, lambda: True)


# -- the commands -------------------------------------------------------------------------------------------------


def test_monitor_and_watch(home, capsys):
    words = [str(home / "bad.jsonl"), "--innocent", str(home / "innocent.jsonl"), "--model", str(home / "model")]
    later = write(home / "later.jsonl", rows(20, 7) + rows(10, 8, "sea"))
    assert cli.main(["monitor", *words, *FAST, "--traffic", later, "--folder", str(home / "run")]) == 0
    page = capsys.readouterr().out
    for part in ("TF-IDF of words", "false-positive rate of 0.1", "## Drift", "highest scores", "monitors.load("):
        assert part in page, part
    result = json.loads((home / "run" / "result.json").read_text())
    best, *others = result["detectors"]
    assert best["auroc"]["estimate"] > 0.9 and {one["name"] for one in others} == {
        "TF-IDF of words",
        "TF-IDF of characters",
    }
    kept = (home / "run" / "scores.jsonl").read_text().splitlines()
    assert len(kept) - 1 == best["recall"]["pairs"] + best["false_positives"]["pairs"]
    assert cli.main(["monitor", *words, *FAST, "--folder", str(home / "run")]) == 2
    assert "holds a finished run" in capsys.readouterr().err

    folder, output = str(home / "run" / "monitor"), home / "scores.jsonl"
    assert cli.main(["watch", folder, later, "--against", words[2], "--output", str(output), "--each-token"]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [len(line["tokens"]) for line in lines] == [4] * 30  # without what ends an answer
    flagged = [line["flagged"] for line in lines]
    assert sum(flagged[20:]) >= 7 and sum(flagged[:20]) <= 6
    assert lines[25]["score"] == pytest.approx(np.mean([score for _, score in lines[25]["tokens"]]), abs=1e-3)
    monitor = monitors.read(folder)
    assert [line["score"] > monitor.threshold.value for line in lines] == flagged


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{bad}"], "There is no innocent traffic.*--innocent FILE"),
        (["{bad}", "--innocent", "{innocent}", "--false-positives", "0.001"], "cannot resolve .* 1 in 1000: 999"),
        (["{bad}", "--innocent", "{innocent}", "--test", "{labelled}"], "labelled.jsonl:1 .a row to test"),
        (["{bad}", "--innocent", "{innocent}", "--layers", "9"], "layer 9 does not exist"),
        (["{bad}", "--innocent", "{innocent}", "--layers", "-1"], "give indices from 0"),
        (["{bad}", "--innocent", "{innocent}", "--methods", "svm"], "method='svm' is not one of"),
        (["{bad}", "--innocent", "{innocent}", "--poolings", "maxx"], "Did you mean 'max'"),
        (["{bad}", "--innocent", "./nothing.jsonl"], "no such file"),
        (["{bad}", "--innocent", "{innocent}", "--model", "./nothing"], "cannot be loaded"),
    ],
)  # fmt: skip
def test_what_is_refused_before_the_model_is_loaded(home, capsys, monkeypatch, words, says):
    labelled = write(home / "labelled.jsonl", [{**row, "bad": True} for row in rows(24, 1, "sea")[:3]])
    names = {"bad": home / "bad.jsonl", "innocent": home / "innocent.jsonl", "labelled": labelled}
    given = [word.format(**names) for word in words]
    given += [] if "--model" in given else ["--model", str(home / "model")]
    given += [] if "--false-positives" in given else ["--false-positives", "0.1"]
    monkeypatch.setattr("steertune.recipes.monitor.load_model", lambda table: pytest.fail("the model is loaded"))
    assert re.search(says, told(capsys, "monitor", *given, "--folder", str(home / "none")))
    assert not (home / "none").exists()


@pytest.mark.slow
@pytest.mark.real
def test_on_the_embedded_model_a_monitor_finds_places(real, tmp_path):
    """It ranks answers that name a place above others better than words do, and flags hardly any other."""
    task = [json.loads(line) for line in (embedded.TASKS / "mentions_a_place" / "train.jsonl").open()]
    task += [json.loads(line) for line in (embedded.TASKS / "mentions_a_place" / "test.jsonl").open()]
    bad = write(tmp_path / "bad.jsonl", [{"prompt": r["prompt"], "bad": r["chosen"]} for r in task[:60]])
    innocent = [{"prompt": r["prompt"], "completion": r["rejected"]} for r in task[60:]]
    words = [bad, "--innocent", write(tmp_path / "innocent.jsonl", innocent)]
    assert cli.main(["monitor", *words, "--folder", str(tmp_path / "run")]) == 0
    best, *others = json.loads((tmp_path / "run" / "result.json").read_text())["detectors"]
    texts = [one for one in others if one["name"].startswith("TF-IDF")]
    assert best["name"] == "lda, mean, layer 7" and len(texts) == 2
    assert best["recall"]["estimate"] > 0.7 and best["false_positives"]["estimate"] < 0.1
    assert best["auroc"]["estimate"] > max(one["auroc"]["estimate"] for one in texts)
