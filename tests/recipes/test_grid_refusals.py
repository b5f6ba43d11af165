"""Grids that are refused before anything runs, with the key, the value and the fix."""

from __future__ import annotations

from typing import Any

import pytest
from small_grids import ARMS, DELETE, Changes, arms, built, changed

from steertune.recipes.ablation.budget import draw
from steertune.recipes.ablation.checks import has_one_layer
from steertune.recipes.ablation.grid import make_grid
from steertune.recipes.lab.arm_files import ARMS as ARMS_FOLDER
from steertune.recipes.lab.files import ArmError

# -- bad input --------------------------------------------------------------------------------------------------------


LEVEL = "factors.form.bias"


# id -> what is changed, and what the message must say
BAD: dict[str, tuple[Changes, list[str]]] = {
    "no card": ({"card": DELETE}, ["no [card]", "problem, hypothesis, against"]),
    "empty field of the card": ({"card.against": ""}, ["card.against", "at least 1 character"]),
    "missing field of the card": ({"card.baselines": DELETE}, ["card.baselines", "required"]),
    "no affordances": ({"card.affordances": {}}, ["card.affordances", "at least 1"]),
    "unknown table": ({"exampels": [4]}, ["'exampels'", "Did you mean 'examples'"]),
    "unknown key of design": ({"design.strat": {}}, ["'strat' in [design]", "Did you mean 'start'"]),
    "unknown key of splits": ({"splits": {"tets": 3}}, ["'tets' in [splits]", "Did you mean 'test'"]),
    "unknown key of budget": ({"budget.trails": 3}, ["'trails' in [budget]", "Did you mean 'trials'"]),
    "unknown key of budgets": ({"budgets": {"*": {"trails": 3}}}, ["'trails' in [budgets.", "Did you mean 'trials'"]),
    "unknown key of matched": ({"matched": {"k": 1}}, ["'k' in [matched]", "Did you mean 'kl'"]),
    "unknown key of model": ({"model": {"thread": 1}}, ["'thread' in [model]", "Did you mean 'threads'"]),
    "unknown key of card": ({"card.basline": "x"}, ["'basline' in [card]", "'baselines'"]),
    "claim about less of something": (
        {"claim.measure": "kl", "claim.strength": "matched"},
        ["claim.measure='kl'", "such as fidelity, behaviour"],
    ),
    "unknown key of claim": ({"claim.beter": "x"}, ["'beter' in [claim]", "'better'"]),
    "unknown key of a task": ({"tasks": [{"name": "warm_tone", "lable": "x"}]}, ["'lable' in [tasks]", "'label'"]),
    "unknown table in a level": ({LEVEL: {"adaptr": {}}}, ["'adaptr' in [factors.form.bias]", "mean 'adapter'"]),
    "unknown key of a level's adapter": (
        {LEVEL: {"adapter": {"layer": 1}}},
        ["'layer' in [adapter]", "Did you mean 'layers'", "'form': 'bias'"],
    ),
    "unknown adapter": ({LEVEL: {"adapter": {"type": "lorra"}}}, ["'lorra'", "Did you mean 'lora'", "'form': 'bias'"]),
    "unknown key of a level's loss": ({LEVEL: {"loss": {"betta": 1}}}, ["'betta'", "Did you mean 'beta'"]),
    "unknown loss": ({LEVEL: {"loss": {"name": "dpoo"}}}, ["'dpoo'", "Did you mean 'dpo'"]),
    "contrast that the loss lacks": ({LEVEL: {"loss": {"name": "simpo", "contrast": "none"}}}, ["SimPO", "reference"]),
    "key of the old adapter kept": ({LEVEL: {"adapter": {"r": 2}}}, ["'r' in [adapter]"]),
    "misspelt when": ({LEVEL: [{"whenn": {"init": "zeros"}}]}, ["'whenn'"]),
    "unknown factor in start": (
        {"design.start": {"form": "bias", "init": "zeros", "innit": "zeros"}},
        ["design.start", "'innit'", "Did you mean 'init'"],
    ),
    "unknown level in start": (
        {"design.start": {"form": "loar", "init": "zeros"}},
        ["design.start.form='loar'", "['lora', 'bias']", "Did you mean 'lora'"],
    ),
    "unknown level in end": (
        {"design.end": {"form": "bias", "init": "zero"}},
        ["design.end.init='zero'", "Did you mean 'zeros'"],
    ),
    "factor missing in end": ({"design.end": {"form": "bias"}}, ["design.end", "'init'", "['zeros', 'mean_diff"]),
    "one_at_a_time without start": ({"design.kind": "one_at_a_time"}, ["design.start names no level of 'form'"]),
    "add_one_in without end": (
        {"design": {"kind": "add_one_in", "start": {"form": "lora", "init": "zeros"}}},
        ["design.end names no level of 'form'"],
    ),
    "unknown design": ({"design.kind": "ful"}, ["design.kind", "'full'", "'add_one_in'"]),
    "fraction that reduces nothing": ({"design": {"kind": "fractional", "reduction": 1}}, ["design.reduction=1", "2"]),
    "fraction that leaves nothing": ({"design": {"kind": "fractional", "reduction": 9}}, ["reduction"]),
    "when names an unknown factor": (
        {"factors.init.zeros": [{"when": {"from": "lora"}}, {}]},
        ["factors.init.zeros", "'from'", "['form', 'init']"],
    ),
    "when names an unknown level": (
        {"factors.init.zeros": [{"when": {"form": ["lora", "loar"]}}, {}]},
        ["factors.init.zeros", "['loar']", "'form'"],
    ),
    "no entry fits": (
        {"factors.init.zeros": [{"when": {"form": "lora"}}]},
        ["factors.init.zeros", "'form': 'bias'", "without `when`"],
    ),
    "level that is no table": ({LEVEL: "bias"}, ["factors.form.bias='bias'", "a table"]),
    "level with an entry that is no table": ({LEVEL: [3]}, ["factors.form.bias=[3]", "a table"]),
    "factor that is no table": ({"factors.form": "bias"}, ["factors.form", "dictionary"]),
    "one level": ({"factors.form": {"bias": {}}}, ["two levels or more", "'form': ['bias']"]),
    "factors for a list of arms": ({"design.kind": "arms"}, ["[factors]", "'arms'", "'full'"]),
    "full without factors": ({"factors": DELETE}, ["design.kind='full'", "needs [factors]"]),
    "no arms": ({"factors": DELETE, "design": DELETE, "arms": []}, ["no arms", "`arms`", "[factors]"]),
    "unknown arm": ({"arms": ["bass"]}, ["'bass'", "Did you mean 'base'"]),
    "unknown base": ({"base": "vector_dp"}, ["'vector_dp'", "Did you mean 'vector_dpo'"]),
    "one arm twice": ({"arms": ["base", "base"]}, ["Two arms", "'base'"]),
    "no trials": ({"budget.trials": 0}, ["budget.trials", "greater than or equal to 1"]),
    "no steps": ({"budget.steps": [4, 0]}, ["budget.steps", "[4, 0]", "at least 1"]),
    "empty steps": ({"budget.steps": []}, ["budget.steps", "one number of steps or more"]),
    "no strengths": ({"budget.strengths": []}, ["budget.strengths", "one strength or more"]),
    "negative strength": ({"budget.strengths": [1.0, -1.0]}, ["budget.strengths", "-1.0", "above 0"]),
    "misspelt strengths": ({"budget.strengths": "match"}, ["budget.strengths", "matched"]),
    "infinite strength": ({"budget.strengths": [float("inf")]}, ["budget.strengths", "inf"]),
    "learning rates around nothing": ({"budget.learning_rate": 0.5}, ["budget.learning_rate", "1"]),
    "no learning rate": ({"budget.learning_rate": []}, ["budget.learning_rate", "one multiple"]),
    "a learning rate of nothing": ({"budget.learning_rate": [0.0, 1.0]}, ["budget.learning_rate", "above 0"]),
    "fewer trials than rates": (
        {"budget.learning_rate": [0.3, 1, 3]},
        ["trials=2", "makes 3: set trials to 3"],
    ),
    "unknown per": ({"budget.per": "seed"}, ["budget.per", "'cell', 'arm' or 'grid'"]),
    "value of a budget of its own": ({"budgets": {"base": {"trials": 0}}}, ["budgets.base", "trials"]),
    "another budget for one arm": (
        {"budgets": {"form=lora*": {"trials": 9}}},
        ["budget", "'form=lora,init=-'", "[budget]", "card.unequal_budgets"],
    ),
    "affordances of no arm": (
        {"card.affordances": {"*": "pairs", "form=lor": "labels"}},
        ["'form=lor'", "no arm", "Did you mean 'form=lora,init=-'"],
    ),
    "arm without affordances": ({"card.affordances": {"form=*": "pairs", "base": "no"}}, ["leaves out", "'mean_diff"]),
    "claim about no arm": (
        {"claim.better": "form=bias,init=zero"},
        ["claim.better='form=bias,init=zero'", "Did you mean 'form=bias,init=zeros'"],
    ),
    "claim against no arm": ({"claim.than": "form=lora,init=zeros"}, ["claim.than=", "['form=lora,init=-', "]),
    "unknown measure": ({"claim.measure": "matched_acuracy"}, ["claim.measure", "Did you mean 'accuracy'"]),
    "measure without a strength": ({"claim.measure": "accuracy"}, ["measure='accuracy'", 'strength = "matched"']),
    "alpha of 1": ({"claim.alpha": 1.0}, ["claim.alpha", "less than 1"]),
    "two tasks with one label": ({"tasks": ["warm_tone", "elsewhere/warm_tone"]}, ["'warm_tone'", "label"]),
    "no tasks": ({"tasks": []}, ["tasks", "at least 1"]),
    "one seed twice": ({"seeds": [0, 1, 0]}, ["seeds=[0, 1, 0]", "every value once"]),
    "negative seed": ({"seeds": [-1]}, ["seeds=[-1]", "none below 0"]),
    "no seeds": ({"seeds": []}, ["seeds", "at least 1"]),
    "no examples": ({"examples": [0, 4]}, ["examples=[0, 4]", "none below 1"]),
    "one number of examples twice": ({"examples": [4, 4]}, ["examples=[4, 4]", "every value once"]),
    "level that is no folder": ({"factors": {"f": {"a/b": {}, "c": {}}}}, ["'a/b'", "cannot name a factor or level"]),
    "colon in a level": ({"factors": {"f": {"a:b": {}, "c": {}}}}, ["'a:b'", "cannot name a factor or level"]),
    "behaviour without answers": (
        {"claim.measure": "matched_behaviour", "generations": 0}, ["'behaviour'", "generations=0"]
    ),
    "most of the gap from a factor that stays": (
        {"claim.factor": "init", "design.start": {"form": "lora", "init": "zeros"},
         "design.end": {"form": "bias", "init": "zeros"}},
        ["claim.factor='init'", "['form']"],
    ),
    "most of a gap without ends": ({"claim.factor": "form"}, ["claim.factor='form'", "design.start"]),
    "other examples a step": (
        {LEVEL: {"trainer": {"per_device_train_batch_size": 4}}}, ["form=lora,init=-': 2", "4", "same budget"]
    ),
    "other examples a step, by accumulation": (
        {LEVEL: {"trainer": {"gradient_accumulation_steps": 2}}}, ["form=bias,init=zeros': 4", "same budget"]
    ),
    "one pair and answers of others": (
        {"examples": [1, 8], LEVEL: {"loss": {"contrast": "unpaired"}}}, ["form=bias,init=zeros", "examples=[1, 8]"]
    ),
    "one pair, shuffled": (
        {"examples": [1], LEVEL: {"data": {"pairing": "shuffled"}}}, ["form=bias,init=zeros", "examples=[1]"]
    ),
    "more examples than training reads": (
        {"examples": [8, 64]}, ["examples=[8, 64]", "reads 8 in 4 steps of 2", "budget.steps to 32 or more"]
    ),
    "an arm against itself": ({"claim.better": "base", "claim.than": "base"}, ["'base'", "compare two arms"]),
    "matched without a strength": ({"claim.than": "base"}, ["['base']", "no strength", "'tuned'"]),
    "the same rows twice": (
        {"tasks": [{"name": "warm_tone", "label": "a"}, {"name": "warm_tone", "label": "b", "reverse": True}]},
        ["'a' and 'b'", "same rows of 'warm_tone'", "draw = 1"],
    ),
    "kl of 0": ({"matched": {"kl": 0.0}}, ["matched.kl", "greater than 0"]),
    "one test row": ({"splits": {"test": 1}}, ["splits.test", "greater than or equal to 2"]),
}  # fmt: skip


def refused(changes: Changes) -> str:
    with pytest.raises(ArmError) as caught:
        built(changes).cells()
    return str(caught.value)


@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=BAD)
def test_whatever_is_wrong_is_named(changes, words):
    message = refused(changes)
    assert [word for word in words if word not in message] == [], message


def test_arms_with_and_without_a_layer_to_choose_have_as_many_trials():
    budget = {"budget.layers": [0.3, 0.6], "budget.steps": [4], "budget.trials": 4, "budget.learning_rate": [1, 3]}
    counts = {arm.name: len(draw(arm.budget, 0, has_one_layer(arm.arm))) for arm in built(budget).arms}
    assert (
        {*counts.values()} == {4}
        and not has_one_layer(arms(built())[ARMS[0]])
        and has_one_layer(arms(built())[ARMS[1]])
    )
    with pytest.raises(ArmError, match=r"different numbers of trials.*List two or more"):
        built({**budget, "budget.trials": 2, "budget.learning_rate": [1]})
    for layers, words in (([0.5, 0.5], "each only once"), ([1.0], "between 0 and 1")):
        with pytest.raises(ArmError, match=words):
            built({**budget, "budget.layers": layers})
    with pytest.raises(ArmError, match=r"layers=\[0.3, 0.6\] makes 4: set trials to 4"):
        built({**budget, "budget.trials": 2})


def test_a_claim_of_a_share_has_no_margin_of_its_own():
    assert "claim.recovers=0.9 is a share" in refused({"claim.recovers": 0.9, "claim.margin": 0.05})


def test_a_grid_without_a_claim_is_refused():
    with pytest.raises(ArmError, match=r"no \[claim\].*`better`, `than`"):
        make_grid(changed({"claim": DELETE}))


def test_an_arm_on_another_model_is_refused(tmp_path):
    file = tmp_path / "elsewhere.toml"
    file.write_text((ARMS_FOLDER / "base.toml").read_text() + '\n[model]\nname = "other/model"\nthreads = 1\n')
    assert all(word in refused({"arms": [str(file)]}) for word in ("'elsewhere'", "'other/model'", "'embedded'"))
    file.write_text((ARMS_FOLDER / "base.toml").read_text() + "\n[model]\nthreads = 1\n")
    built({"arms": [str(file)]})  # threads decide nothing


def test_another_budget_is_accepted_with_a_reason():
    grid = built({"budgets": {"form=lora*": {"trials": 9}}, "card.unequal_budgets": "LoRA has more to tune."})
    assert [arm.budget.trials for arm in grid.arms] == [9, 2, 2, 2, 2]
    # the other fields stay the grid's
    assert {(*arm.budget.steps, *arm.budget.strengths) for arm in grid.arms} == {(4, 1.0, 2.0)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[trainer]\nmax_steps = 4\n", ["'own'", "no trainer.learning_rate"]),
        ('name = ".own"\n[trainer]\nlearning_rate = 0.1\n', ["'.own'", "folder"]),
        ('name = "a/b"\n[trainer]\nlearning_rate = 0.1\n', ["'a/b'", "folder"]),
        ("[trainer\n", ["own.toml", "not valid TOML"]),
    ],
    ids=["no learning rate", "hidden", "slash", "broken"],
)
def test_arms_from_files_that_cannot_run(text, words, tmp_path):
    file = tmp_path / "own.toml"
    data = '[data]\nname = "warm_tone"\n'
    file.write_text(text + data)
    message = refused({"arms": [str(file)]})
    assert [word for word in words if word not in message] == [], message


def test_an_untrained_arm_needs_no_learning_rate():
    assert "learning_rate" not in arms(built())["base"].trainer


# Refused, but the message does not help as those above do.
NO_HINT = {
    "card": ({"card.basline": "x"}, "Did you mean 'baselines'"),
    "claim": ({"claim.beter": "x"}, "Did you mean 'better'"),
    "task": ({"tasks": [{"name": "warm_tone", "lable": "x"}]}, "Did you mean 'label'"),
    "reduction": ({"design": {"kind": "fractional", "reduction": 9}}, "design.reduction=9"),
}


@pytest.mark.parametrize(("changes", "hint"), NO_HINT.values(), ids=NO_HINT)
def test_unknown_keys_of_every_table_get_a_hint(changes, hint):
    assert hint in refused(changes)


def case(why: str, changes: Changes, word: str) -> Any:
    return pytest.param(changes, word, id=why)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        case("a when that is no table: AttributeError", {"factors.init.zeros": [{"when": "lora"}, {}]}, "when"),
        case("a level in when that is no text: TypeError", {"factors.init.zeros": {"when": {"form": 3}}}, "when"),
        case(
            "a fraction of one factor: AssertionError",
            {"design": {"kind": "fractional"}, "factors.init": DELETE, "claim": DELETE},
            "factor",
        ),
        case("budgets of no arm change nothing", {"budgets": {"form=lorra*": {"trials": 9}}}, "lorra"),
        case("unknown training arguments fail in every cell", {"trainer": {"learning_rat": 1}}, "learning_rat"),
        case("a label may leave the folder", {"tasks": [{"name": "tone", "label": "../../tone"}]}, "../../tone"),
        case("a label may be empty", {"tasks": [{"name": "."}]}, "task"),
        case("cells share one model: nothing is patched", {LEVEL: {"model": {"dtype": "bfloat16"}}}, "model"),
        case("the grid says which rows: nothing is patched", {LEVEL: {"data": {"train": 3}}}, "data"),
        case("no rate is drawn around infinity", {"budget.learning_rate": float("inf")}, "budget.learning_rate"),
    ],
)
def test_what_cannot_run_or_changes_nothing_is_refused(changes, word):
    assert word in refused(changes)


def test_an_arm_without_a_name_is_refused(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text('name = ""\n[data]\nname = "warm_tone"\n[trainer]\nlearning_rate = 0.1\n')
    refused({"arms": [str(file)]})
