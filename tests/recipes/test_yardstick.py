"""Planted contrasts: the teachers and data are what they should be, and winners and false claims are counted right."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from paths import ROOT
from scipy import stats

from steertune.recipes.lab import measures
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.likelihood import answer_logps
from steertune.recipes.lab.pages import Table
from steertune.recipes.studies import planting, yardstick
from steertune.recipes.studies.planting.plants import KL, PLANTS, plant
from steertune.recipes.studies.planting.students import COMPARISONS, TRUTH, measured, students
from steertune.recipes.studies.planting.winners import compared, looks, rate, sections, trust_order, truths
from steertune.recipes.studies.planting.worlds import Sizes

SMALL = Sizes(tasks=2, train=24, test=16, fresh=16, new_tokens=12, steps=3)


@pytest.fixture(scope="module")
def world():
    return replace(yardstick.world_of("tiny"), sizes=SMALL)


@pytest.fixture(scope="module")
def neutral(world):
    return yardstick.neutral_of(world)


def kl_to_base(world, model, rows) -> float:
    shown = batches(world.tokenizer, rows, 64)
    own, base = answer_logps(model, shown), answer_logps(world.model, shown)
    values = [(a.exp() * (a - b)).sum(dim=-1) for (a, _), (b, _) in zip(own, base, strict=True)]
    return float(torch.cat(values).mean())


def test_answers_of_the_tiny_model_end_as_often_as_they_should(world):
    """Otherwise an arm that learns answers would learn their ends, which the teacher does not have."""
    prompts = world.prompts(200, seed=5)
    texts = world.answers(world.model, prompts, seed=6)
    ended = [len(text.split()) for text in texts if text]
    expected = 1 - (1 - 0.12) ** SMALL.new_tokens
    assert len(ended) / len(texts) == pytest.approx(expected, abs=0.15)
    assert len({*ended}) > 5, "lengths differ"


@pytest.mark.parametrize("problem", ["both", "lora"])
def test_a_teacher_has_the_stated_kl(problem, world, neutral):
    task = plant(PLANTS[problem], world, 3, neutral)
    assert kl_to_base(world, task.teacher, neutral.matching) == pytest.approx(KL, rel=0.15)


def mean_log_ratio(world, teacher, rows, side: str) -> float:
    """How much likelier the teacher finds answers than the base does, in nats per token."""
    shown = batches(world.tokenizer, rows.select_columns(["prompt", side]).rename_column(side, "completion"), 64)
    totals = [
        float(sum(logps.gather(1, ids[:, None]).sum() for logps, ids in answer_logps(model, shown)))
        for model in (teacher, world.model)
    ]
    return (totals[0] - totals[1]) / int(sum(batch.count("token") for batch in shown))


def test_what_the_answers_carry(world, neutral):
    """`both` and `chosen` carry the teacher in the chosen answers; a coin's pairs carry nothing of theirs."""
    larger = replace(world, sizes=replace(SMALL, train=128))
    ratios = {}
    for name in ("both", "chosen", "coin"):
        task = plant(PLANTS[name], larger, 4, neutral)
        ratios[name] = [mean_log_ratio(larger, task.teacher, task.train, side) for side in ("chosen", "rejected")]
    for name in ("both", "chosen"):
        assert ratios[name][0] > 0 > ratios[name][1], ratios
    assert ratios["coin"][0] < 0 and ratios["coin"][1] < 0, "both are the base's"


def test_prompts_are_trained_on_or_tested_and_never_both(world, neutral):
    task = plant(PLANTS["pair"], world, 5, neutral)
    parts = [task.train, task.again, task.test, task.fresh]
    prompts = [{*part["prompt"]} for part in parts]
    assert all(not a & b for i, a in enumerate(prompts) for b in prompts[i + 1 :])


def test_the_teacher_itself_is_the_truth(world, neutral):
    task = plant(PLANTS["both"], world, 6, neutral)
    base = world.vector(torch.full((world.width,), 1e-4))
    found = measured(world, task, {"teacher": task.teacher, **students(world, task, 6, ["chosen"])}, neutral)
    assert found["teacher"][TRUTH].mean() < 0.01 < found["chosen"][TRUTH].mean()
    assert found["teacher"]["fidelity"].mean() > 0.9
    assert kl_to_base(world, base, neutral.matching) < 1e-4


def test_a_comparison_is_oriented_by_what_is_better():
    rng = np.random.default_rng(0)
    tasks = [
        {
            arm: {"accuracy": good + rng.normal(0, 0.01, 30), "kl": -good + rng.normal(0, 0.01, 30),
                  TRUTH: -good + rng.normal(0, 0.01, 30)}
            for arm, good in (("pairs", 0.8), ("chosen", 0.5))
        }
        for _ in range(5)
    ]  # fmt: skip
    says = compared(tasks)["contrast"]
    assert [*compared(tasks)] == ["contrast"]
    for estimate, p in says.values():
        assert estimate == pytest.approx(0.3, abs=0.02) and p < 0.001


def made_up(problem: str, **comparisons) -> dict:
    return {"problem": problem, "sizes": {"tasks": 6}, "comparisons": comparisons}


def test_winners_losers_and_nulls_are_counted():
    studies = [
        made_up("both", contrast={TRUTH: [0.5, 0.2], "accuracy": [0.2, 0.01], "margin": [-0.2, 0.01]}),
        made_up("both", contrast={TRUTH: [0.4, 0.2], "accuracy": [0.2, 0.2], "margin": [0.2, 0.2]}),
        made_up("both", contrast={TRUTH: [0.6, 0.2], "accuracy": [-0.2, 0.2], "margin": [-0.2, 0.2]}),
        made_up("pair", **{"twins pairs": {TRUTH: [0.5, 0.001], "accuracy": [0.1, 0.03], "kl": [0.1, 0.5]}}),
        made_up("pair", contrast={TRUTH: [0.5, 0.2], "accuracy": [0.1, 0.03]}),
        made_up("coin", contrast={TRUTH: [0.5, 0.001], "accuracy": [0.1, 0.3], "kl": [0.1, 0.001]}),
    ]
    assert [*truths(studies)] == [("both", "contrast"), ("pair", "contrast")]
    assert truths(studies)["both", "contrast"] == (pytest.approx(0.5), pytest.approx(0.0249, abs=1e-3))
    everything = looks(studies)
    both = [(look.measure, look.right, look.claims) for look in everything if look.problem == "both"]
    assert both[1:3] == [("accuracy", True, True), ("margin", False, True)]
    assert [right for measure, right, _ in both if measure == "accuracy"] == [True, True, False]
    found = {(look.problem, look.comparison, look.measure): look for look in everything}
    assert found["pair", "contrast", "accuracy"].right is None, "the teachers do not agree"
    assert found["pair", "twins pairs", "accuracy"].null and found["pair", "twins pairs", "accuracy"].claims
    assert found["coin", "contrast", "accuracy"].null and not found["coin", "contrast", "accuracy"].claims
    assert not found["coin", "contrast", "kl"].null, "a coin says nothing of what is no pair"
    tables = {b.name: b.frame for section in sections(studies) for b in section.blocks if isinstance(b, Table)}
    claims = tables["claims"].set_index("measure")
    assert claims.loc["accuracy", "nulls"] == "2"
    assert claims.loc["accuracy", "claims of nothing"] == rate([True, False])
    assert claims.loc["margin", "claims the loser"] == rate([True, False, False])
    assert tables["winners"].set_index("measure").loc["accuracy", "both: contrast"] == "67%"
    assert tables["truth"].loc[0, "studies in which it is nearer"] == "3 of 3"


def test_the_truth_of_several_studies_is_that_of_all_their_teachers():
    """From estimates and p of studies alone; by hand: Student's t over all teachers, each study with its own mean."""
    rng = np.random.default_rng(0)
    teachers = [0.3 + rng.normal(0, 0.5, 6) for _ in range(3)]
    studies = [
        made_up("both", contrast={TRUTH: [values.mean(), float(stats.ttest_1samp(values, 0.0).pvalue)]})
        for values in teachers
    ]
    variances = [values.var(ddof=1) / 6 for values in teachers]
    freedom = sum(variances) ** 2 / sum(v**2 / 5 for v in variances)
    mean = np.mean(teachers)
    expected = 2 * stats.t.sf(mean / (sum(variances) ** 0.5 / 3), freedom)
    assert truths(studies)["both", "contrast"] == (pytest.approx(mean), pytest.approx(expected))


def test_a_study_with_one_teacher_has_a_truth_of_its_own():
    studies = [
        made_up("both", contrast={TRUTH: truth, "accuracy": [0.2, 0.5]}) | {"sizes": {"tasks": 1}}
        for truth in ([0.5, 0.01], [-0.4, 0.01], [0.1, 0.4])
    ]
    assert [look.right for look in looks(studies) if look.measure == "accuracy"] == [True, False, None]
    # over studies, teachers are a sample
    expected = stats.ttest_1samp([0.5, -0.4, 0.1], 0.0).pvalue
    assert truths(studies)["both", "contrast"] == (pytest.approx(0.2 / 3), pytest.approx(expected))


def test_where_nothing_is_planted_every_comparison_of_pairs_is_a_null():
    everything = looks([made_up("nothing", layers={"accuracy": [0.1, 0.03]}, sites={"accuracy": [0.1, 0.3]})])
    assert [(look.null, look.claims, look.right) for look in everything] == [(True, True, None), (True, False, None)]


def test_other_rejected_answers_show_the_opposite(world, neutral):
    task = plant(PLANTS["plain"], replace(world, sizes=replace(SMALL, train=128)), 4, neutral)
    ratios = [mean_log_ratio(world, task.teacher, task.train, side) for side in ("chosen", "rejected", "opposed")]
    assert ratios[0] > 0 > ratios[1] > ratios[2]


def vector_of(model):
    return next(p.detach() for name, p in model.named_parameters() if "steering_vector_v" in name)


def test_versions_are_further_answers_and_pairs_are_few(world, neutral):
    task = plant(PLANTS["few"], replace(world, sizes=replace(SMALL, train=160)), 15001, neutral)
    assert len(task.train) == len(task.again) == PLANTS["few"].train
    assert task.train["version"] != task.train["chosen"], "another draw"
    assert all(mean_log_ratio(world, task.teacher, task.train, side) > 0 for side in ("chosen", "version"))


def test_arms_start_from_the_mean_difference_and_learn_versions(world, neutral):
    untrained = replace(world, sizes=replace(SMALL, steps=0))
    task = plant(PLANTS["few"], untrained, 3, neutral)
    models = students(untrained, task, 3, ["chosen", "started"])
    zero, start = map(vector_of, models.values())
    assert not zero.any() and float(start.norm()) > 0.1
    models = students(world, task, 3, ["chosen", "versions"])
    one, both = map(vector_of, models.values())
    assert not torch.equal(one, both)


@pytest.mark.parametrize(("problem", "layers"), [("spread", 4), ("preserve", 1), ("sparse", 1)])
def test_teachers_of_other_kinds_have_the_same_kl(problem, layers, world, neutral):
    teacher = plant(PLANTS[problem], world, 3, neutral).teacher
    vectors = [p for name, p in teacher.named_parameters() if "steering_vector_v" in name]
    assert len(vectors) == layers and len({float(v.detach().flatten()[0]) for v in vectors}) == layers
    assert problem != "sparse" or int((vectors[0] != 0).sum()) == world.width // 16
    assert kl_to_base(world, teacher, neutral.matching) == pytest.approx(KL, rel=0.15)


def test_trusted_measures_come_first_and_none_is_left_out():
    order = measures.ranked()
    trust = [measures.get(name).trust for name in order]
    assert sorted(order) == [*measures.names()]
    ranks = [rank for rank in trust if rank is not None]
    assert ranks == sorted(ranks) and trust[: len(ranks)] == ranks and len({*ranks}) == len(ranks)


def test_the_trust_of_every_measure_is_its_place_in_the_committed_table():
    studies = json.loads((ROOT / "docs" / "results" / "planted" / "studies.json").read_text(encoding="utf-8"))
    order = trust_order([one for one in studies if one["world"] == "tiny"])
    assert {name: measures.get(name).trust for name in order} == {name: i + 1 for i, name in enumerate(order)}
    assert [name for name in measures.names() if measures.get(name).trust is not None and name not in order] == []


def test_a_measure_that_knows_nothing_has_no_place():
    rng = np.random.default_rng(0)
    says = {"margin": [0.2, 0.01], "behaviour": [0.2, 0.3], "kl": [0.2, 0.01]}
    contrasts = [
        says | {TRUTH: [0.5 + 0.1 * rng.normal(), 0.01], "accuracy": [0.2 * (-1) ** i, 0.2]} for i in range(12)
    ]
    studies = [made_up("both", contrast=contrast) for contrast in contrasts]
    assert trust_order(studies) == ["margin", "behaviour"], "claims break the tie; a measure of damage has no place"


@pytest.mark.slow
def test_the_suite_runs_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(yardstick.SIZES, "tiny", SMALL)
    words = ["--problems", "pair", "coin", "--studies", "1", "--folder", str(tmp_path)]
    assert yardstick.main(words) == 0
    before = (tmp_path / "studies.json").read_text()
    found = json.loads(before)
    assert [one["problem"] for one in found] == ["pair", "coin"]
    assert {*found[0]["comparisons"]} == {"contrast", "layer", "form", "twins pairs", "twins chosen"}
    assert all(math.isfinite(p) for one in found for says in one["comparisons"].values() for _, p in says.values())
    assert yardstick.main(words) == 0
    assert (tmp_path / "studies.json").read_text() == before
    assert "claims the loser" in (tmp_path / "table.md").read_text()


def test_a_factor_that_no_problem_has_is_refused(tmp_path, capsys):
    words = ["--problems", "coin", "--factors", "layer", "--folder", str(tmp_path / "run")]
    assert yardstick.main(words) == 2
    assert "['coin'] compare ['contrast']. Choose from these, or choose other --problems." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_names_that_help_shows_are_those_of_the_problems():
    assert list(planting.PLANTS) == list(PLANTS) and list(planting.WORLDS) == list(yardstick.SIZES)
    assert list(planting.FACTORS) == list(COMPARISONS)
    assert {factor for problem in PLANTS.values() for factor in problem.factors} == {*COMPARISONS}
