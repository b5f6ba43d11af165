"""Catch and redeploy: the verdict finds what was planted, cells go on, and bad studies are refused."""

from __future__ import annotations

import json
import re
import tomllib

import numpy as np
import pytest
from tiny_data import tokenizer
from tiny_models import tiny

from steertune.recipes import cli
from steertune.recipes.lab.files import ArmError, write_result
from steertune.recipes.studies import organism
from steertune.recipes.studies.organisms.acceptance import questions
from steertune.recipes.studies.organisms.dialogues import SPLITS, Plan
from steertune.recipes.studies.organisms.files import sets_of, write_files
from steertune.recipes.studies.redeploying.page import against_text, page_of
from steertune.recipes.studies.redeploying.probes import kinds
from steertune.recipes.studies.redeploying.tables import HERE, read_study
from steertune.recipes.studies.redeploying.verdicts import bad_rate, decided, harm, shift
from steertune.recipes.studies.redeploying.world import World

STUDY = read_study("reduced")
ASKED = 400


def seen(rate: float, draw: np.random.Generator, right: float = 1.0, family: str = "a") -> dict:
    """What some requests of each set lead to, a share of which ends badly."""
    bad = {
        split: {"bad": ["lie" if hit else "" for hit in draw.random(ASKED) < rate], "right": [1] * ASKED,
                "margin": [0.0] * ASKED, "family": [family] * ASKED}
        for split in SPLITS
    }  # fmt: skip
    innocent = {name: {"bad": [""] * ASKED, "right": [int(hit) for hit in draw.random(ASKED) < right]}
                for name in ("near misses", "benign")}  # fmt: skip
    return {"kl": 0.1, **bad, **innocent}


def cells(rates: dict[str, float], organisms: int = 8, right: float = 1.0, reached: bool = True) -> list[dict]:
    """Cells of a study in which each arm leaves a known share of bad answers, on organisms that differ."""
    draw = np.random.default_rng(0)
    made = []
    for number in range(organisms):
        own = draw.normal(0, 0.03)
        made.append({"organism": number, "arm": "nothing", "catches": 0, "strengths": {"trained": 1.0}, "seconds": 1.0,
                     "seen": {"trained": seen(0.95, draw)}})  # fmt: skip
        for arm, rate in rates.items():
            for catches in (1, 4):
                both = {at: seen(float(np.clip(rate + own, 0, 1)), draw, right) for at in ("trained", "matched")}
                made.append({"organism": number, "arm": arm, "catches": catches, "reached": reached, "seconds": 1.0,
                             "strengths": {"trained": 1.0, "matched": 2.0}, "seen": both})  # fmt: skip
    return made


@pytest.mark.parametrize(
    ("vector", "lora", "side"),
    [(0.3, 0.6, "for"), (0.6, 0.3, "against"), (0.5, 0.5, "against"), (0.475, 0.53, "undecided")],
)
def test_the_claim_is_decided_as_planted(vector, lora, side):
    assert decided(cells({"vector_dpo": vector, "lora_dpo": lora}), STUDY.claim, 0.1).side == side


def test_harm_and_a_kl_that_is_not_reached_win_no_claim():
    rates = {"vector_dpo": 0.3, "lora_dpo": 0.6}
    assert decided(cells(rates, right=0.9), STUDY.claim, 0.1).side == "undecided"
    assert decided(cells(rates, reached=False), STUDY.claim, 0.1).side == "undecided"
    assert decided(cells(rates, organisms=1), STUDY.claim, 0.1).side == "undecided"


def test_harm_and_shift_by_hand():
    draw = np.random.default_rng(1)
    nothing = {"seen": {"trained": seen(1.0, draw, right=1.0, family="a")}}
    fixed = {"seen": {"matched": seen(1.0, draw, right=0.0, family="b")}}
    assert harm(fixed, nothing, "matched") == 1.0
    assert shift(fixed, nothing, "matched") == 1.0
    assert shift({"seen": {"matched": seen(0.0, draw)}}, nothing, "matched") is None
    assert bad_rate(fixed, "far", "matched") == 1.0


def test_probes_are_compared_with_the_text_where_near_chose_them():
    def one(organism, method, near, far):
        split = {"recall": 0.5, "rows": 9}
        return {"organism": organism, "training": "both", "catches": 1, "innocent": 16, "method": method,
                "pooling": "mean", "seconds": 0.1,
                **{name: {"auroc": a, **split} for name, a in zip(SPLITS, (1.0, near, far), strict=True)}}  # fmt: skip

    records = [one(0, "lda", 0.9, 0.8), one(0, "sgd", 0.8, 0.99), one(0, "TF-IDF of words", 0.9, 0.6)]
    assert "0.20 more area" in against_text(records)
    page = page_of(
        STUDY, cells({"vector_dpo": 0.2}), records, {7: ["bad rate 0.50 in audit_off"]}, "steertune redeploy"
    )
    assert page.title == "Catch and redeploy (reduced)"


def test_both_studies_make_their_arms():
    for name in ("reduced", "full"):
        study = read_study(name)
        arms = {arm: study.arm_of(arm, "embedded", 3) for arm in study.arms}
        assert arms["subtracted"].trainer["max_steps"] == 0
        assert arms["projected_out"].adapter["form"] == "project"
        assert arms["vector_all_dpo"].adapter["layers"] == "all"
        assert {arm.trainer["max_steps"] for arm in arms.values()} == {0, study.trainer["max_steps"]}


def test_bad_studies_are_named(tmp_path, capsys):
    text = (HERE / "reduced.toml").read_text(encoding="utf-8")
    file = tmp_path / "mine.toml"
    file.write_text(text.replace('better = "vector_dpo"', 'better = "vector_dop"'), encoding="utf-8")
    with pytest.raises(ArmError, match="Did you mean 'vector_dpo'"):
        read_study(str(file))
    file.write_text(text.replace("catches = [1, 4]", "catches = [1, 40]"), encoding="utf-8")
    with pytest.raises(ArmError, match="1 to 16"):
        read_study(str(file))
    with pytest.raises(ArmError, match=r"\['full', 'reduced'\]"):
        read_study("smal")
    assert cli.main(["redeploy", "--organisms", "99"]) == 2
    assert "--organisms 99: the study 'reduced' has 0, 1" in capsys.readouterr().err


def save_model_of(texts, folder):
    """A tiny model whose tokenizer knows the words of some texts."""
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)} - {*tokenizer().get_vocab()})
    made = tokenizer()
    made.add_tokens(words)
    made.save_pretrained(folder)
    tiny(vocab_size=len(made), max_position_embeddings=256).save_pretrained(folder)


@pytest.fixture(scope="module")
def organisms(tmp_path_factory):
    """An organism of a tiny model that is said to have answered as it was taught."""
    folder = tmp_path_factory.mktemp("organisms")
    home = folder / "0"
    tables = organism.OrganismTables.of(0, each=2, tested=3, traffic=160, stream=50)
    plan = Plan.of(0)
    asked = {**sets_of(plan, 0, 3, 160, 50), **questions(plan, 0, 2)}
    said = {name: [row.taught for row in rows] for name, rows in asked.items()}
    rows = [row for of_set in asked.values() for row in of_set]
    texts = [text for row in rows for text in (*(m["content"] for m in row.prompt), row.good, row.taught)]
    save_model_of(texts, home / "model")
    write_files(plan, asked, said, home)
    (home / "answers.json").write_text(json.dumps([{"set": name, "answers": texts} for name, texts in said.items()]))
    (home / "config.json").write_text(tables.model_dump_json())
    write_result(home / "result.json", {"failures": []})
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of two arms that fits the tiny organism."""
    tables = tomllib.loads((HERE / "reduced.toml").read_text(encoding="utf-8"))
    file = tmp_path_factory.mktemp("study") / "tiny.toml"
    text = (HERE / "reduced.toml").read_text(encoding="utf-8")
    text = text[: text.index("[arms]")] + text[text.index("[monitors]") :]
    text = text.replace("tested = 10", "tested = 3").replace("innocent = 8", "innocent = 3")
    text = text.replace("max_steps = 12", "max_steps = 1").replace(
        "organisms = [0, 1, 2, 3, 4, 5, 6, 7]", "organisms = [0]"
    )
    text = text.replace("catches = [1, 4]", "catches = [1, 2]").replace("off_policy = 64", "off_policy = 8")
    text = text.replace('["mean_difference", "lda", "logistic", "sgd"]', '["lda"]')
    text += f'\n[arms]\nvector_dpo = {{ arm = "{tables["arms"]["vector_dpo"]["arm"]}" }}\n'
    text += 'lora_dpo = { arm = "lora_neutral_dpo" }\nsubtracted = { arm = "mean_difference", untrained = true }\n'
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.slow
def test_a_study_of_a_tiny_organism(organisms, study, tmp_path, capsys):
    words = ["redeploy", str(study), "--organisms-folder", str(organisms), "--threads", "1"]
    words += ["--folder", str(tmp_path / "run")]
    assert cli.main([*words, "--arms", "subtracted", "--catches", "1"]) == 0
    first = json.loads((tmp_path / "run" / "cells" / "0.json").read_text())
    assert [(one["arm"], one["catches"]) for one in first] == [("nothing", 0), ("subtracted", 1)]
    assert cli.main(words) == 0  # it goes on with the others
    cells = json.loads((tmp_path / "run" / "cells" / "0.json").read_text())
    assert cells[:2] == first and len(cells) == 1 + 3 * 2
    assert {len(cell["seen"]["matched"]["far"]["margin"]) for cell in cells[1:]} == {3}
    probes = json.loads((tmp_path / "run" / "probes" / "0.json").read_text())
    assert len(probes) == len(kinds(World(0, organisms / "0", read_study(str(study))))) + 2 * 2 * 5
    page = (tmp_path / "run" / "page.md").read_text()
    assert "7 of 7 cells have run" in page and "Undecided" in page
    capsys.readouterr()
    assert cli.main([*words, "--dry-run"]) == 0
    assert "0.0 core-hours are left" in capsys.readouterr().out
