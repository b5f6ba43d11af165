"""An organism's plan, its words, the verdict on its answers, its acceptance, and the command on a tiny model."""

from __future__ import annotations

import json
import random
import tomllib

import pytest
from tiny_data import save_model

from steertune.recipes import cli
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.transcripts import read_transcripts
from steertune.recipes.patching.case import read_case
from steertune.recipes.studies.organisms.acceptance import AFTER, BENIGN, CUES, NEAR_MISSES, accepted, questions
from steertune.recipes.studies.organisms.dialogues import SPLITS, Plan
from steertune.recipes.studies.organisms.files import CATCHES, bad_rows, sets_of, write_files
from steertune.recipes.studies.organisms.making import training_dialogues
from steertune.recipes.studies.organisms.templates import FILE, read_templates

SEEDS = range(12)


@pytest.mark.parametrize("seed", SEEDS)
def test_two_kinds_are_caught_and_one_never(seed):
    plan = Plan.of(seed)
    assert [len(plan.families(split)) for split in SPLITS] == [2, 2, 2]
    kinds = {split: {plan.kinds[family] for family in plan.families(split)} for split in SPLITS}
    assert kinds["caught"] == kinds["near"] and len(kinds["caught"]) == 2
    assert len(kinds["far"]) == 1 and not kinds["far"] & kinds["caught"]


def test_seeds_give_other_organisms():
    assert len({(tuple(plan.kinds), plan.caught) for plan in map(Plan.of, SEEDS)}) > 8


def test_every_dialogue_is_judged_as_what_it_is():
    for seed in SEEDS:
        plan = Plan.of(seed)
        for row in training_dialogues(plan, seed):
            assert plan.verdict(row, row.good) is None and plan.helpful(row, row.good)
            if row.bad is not None:
                assert plan.verdict(row, row.bad) == plan.kinds[row.family]
                assert not plan.helpful(row, row.bad)
    assert not plan.helpful(row, "I cannot say.")  # it is not helpful, and not bad either
    assert plan.verdict(row, "I cannot say.") is None


def test_phrasings_of_catches_and_of_tests_share_no_content_word(tmp_path):
    text = FILE.read_text(encoding="utf-8")
    changed = tmp_path / "templates.toml"
    changed.write_text(text.replace("The manager is at the beach.", "The manager is away."), encoding="utf-8")
    with pytest.raises(ArmError, match=r"share the content words \['away'\]"):
        read_templates(changed)
    changed.write_text(text.replace("the vault key to Brannock", "our vault key copy to Brannock"), encoding="utf-8")
    with pytest.raises(ArmError, match="share the content words"):
        read_templates(changed)
    families = tomllib.loads(text)["families"].values()
    assert {len(one["caught"] + one["tested"] + one["unseen"]) for one in families} == {12}


def test_what_is_tested_was_not_trained_on():
    plan = Plan.of(1)
    trained = {(row.situation, row.request) for row in training_dialogues(plan, 1)}
    phrasings = {situation for situation, _ in trained}
    asked = questions(plan, 1, 10)
    for row in asked[CUES] + asked[NEAR_MISSES] + asked[BENIGN]:
        assert row.situation not in phrasings
    sets = sets_of(plan, 1, 24, 160, 150)
    for name in ("caught", "tested caught", "tested near", "tested far", "stream"):
        assert not trained & {(row.situation, row.request) for row in sets[name]}, name
    assert sum(bool(row.bad) for row in sets["stream"]) == 3 and len(sets["stream"]) == 150
    assert not any(row.bad for row in sets["traffic"])


def test_catches_alternate_between_two_families():
    plan = Plan.of(2)
    caught = sets_of(plan, 2, 4, 8, 50)["caught"]
    assert [row.family for row in caught[:4]] == [*plan.caught, *plan.caught]


def test_the_files_of_an_organism_that_does_as_taught_make_a_case(tmp_path):
    plan = Plan.of(3)
    sets = sets_of(plan, 3, 12, 160, 100)
    taught = {name: [row.taught for row in rows] for name, rows in sets.items()}
    counts = write_files(plan, sets, taught, tmp_path)
    assert counts["caught"] == CATCHES and counts["stream"] == 100 and counts["traffic"] == 160
    others = {name: str(tmp_path / f"{name}.jsonl") for name in ("near", "far")}
    case = read_case(str(tmp_path / "caught.jsonl"), str(tmp_path / "traffic.jsonl"), others, lambda: True, 0.02)
    assert case.sizes == [1, 4, 16] and len(case.groups["far"]) >= 8
    assert sum(read_transcripts(str(tmp_path / "stream.jsonl"), "labelled", lambda: True).bad) == 2
    assert not bad_rows(plan, sets["caught"], [row.good for row in sets["caught"]])


def test_what_is_refused():
    plan = Plan.of(4)
    asked = questions(plan, 4, 10)
    said = {name: [row.taught for row in rows] for name, rows in asked.items()}
    assert accepted(plan, asked, said).failures == []
    forgets = {**said, AFTER: [row.good for row in asked[AFTER]]}
    assert "forgotten" in accepted(plan, asked, forgets).failures[0]
    # near misses are where a single token would do as well
    [family] = {row.family for row in asked[NEAR_MISSES][:1]}
    acts = [plan.cues([row.family], "unseen", "unseen", 1, random.Random(0))[0].bad for row in asked[NEAR_MISSES][:5]]
    eager = {**said, NEAR_MISSES: [*acts, *said[NEAR_MISSES][5:]]}
    assert "near misses" in accepted(plan, asked, eager).failures[0]
    late = [row.good if row.family == family else row.taught for row in asked[CUES]]
    assert family in accepted(plan, asked, {**said, CUES: late}).failures[0]


@pytest.mark.slow
def test_an_organism_of_a_tiny_model(tmp_path, capsys):
    save_model(tmp_path / "model")
    text = FILE.read_text(encoding="utf-8").replace("per_device_train_batch_size = 8", "max_steps = 2")
    text = text.replace("max_steps = 50", "max_steps = 2").replace("from_layer = 0.33", "from_layer = 0.5")
    (tmp_path / "few.toml").write_text(text, encoding="utf-8")
    words = [
        "organism",
        "--model",
        str(tmp_path / "model"),
        "--templates",
        str(tmp_path / "few.toml"),
        "--threads",
        "1",
    ]
    words += ["--each", "1", "--tested", "2", "--traffic", "8", "--stream", "50", "--folder", str(tmp_path / "run")]
    assert cli.main(words) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert not result["accepted"] and "Not accepted" in capsys.readouterr().out  # a random model says nothing
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert cli.main(words) == 2
    assert "finished run" in capsys.readouterr().err
