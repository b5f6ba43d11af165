"""Grids: which arms and cells a file means, what a cell's keys depend on, and whatever is wrong is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from small_grids import ARMS, DELETE, GRID, Changes, arms, built, changed, factorial

from steertune.losses import get_loss
from steertune.recipes.ablation import grid as module
from steertune.recipes.ablation.budget import draw
from steertune.recipes.ablation.grid import Cell, Grid, describe, load_grid, make_grid
from steertune.recipes.lab.arm import load_arm
from steertune.recipes.lab.files import ArmError

# -- arms and cells ---------------------------------------------------------------------------------------------------


def test_arms_their_levels_and_their_order():
    grid = built()
    assert [arm.name for arm in grid.arms] == ARMS
    assert [arm.levels for arm in grid.arms] == [
        {"form": "lora", "init": "-"},
        {"form": "bias", "init": "zeros"},
        {"form": "bias", "init": "mean_difference"},
        None,
        None,
    ]
    assert grid.notes == ["Full factorial: 4 combinations."]
    assert {(arm.budget.trials, *arm.budget.steps, *arm.budget.strengths) for arm in grid.arms} == {(2, 4, 1.0, 2.0)}


def test_cells_are_whole_comparisons_seed_by_seed():
    cells = built().cells()
    assert [(c.seed, c.task.label, c.examples, c.arm.name) for c in cells] == [
        (seed, task, examples, arm)
        for seed in (0, 1)
        for task in ("warm_tone", "cautious_advice_reversed")
        for examples in (4, 8)
        for arm in ARMS
    ]
    assert cells[0].path == Path("cells/warm_tone/n4/seed0/form=lora,init=-")
    assert cells[0].title == "warm_tone n=4 seed=0 form=lora,init=-"
    assert describe(cells) == "40 cells: 5 arms x 2 tasks x 2 numbers of examples x 2 seeds"
    assert len({cell.path for cell in cells}) == len({cell.key for cell in cells}) == 40


def test_making_a_grid_leaves_its_tables_alone():
    tables = changed()
    make_grid(tables).cells()
    assert tables == changed()


def test_tasks_by_name_or_table():
    plain, table = built().tasks
    assert (plain.name, plain.label, plain.reverse, plain.scorer) == (
        "warm_tone", "warm_tone", False, {"kind": "classifier"},
    )  # fmt: skip
    assert (table.name, table.reverse, table.scorer["pattern"]) == ("cautious_advice", True, "careful")
    assert built({"tasks": [{"name": "somewhere/far/tone"}]}).tasks[0].label == "tone"
    assert built({"tasks": [{"name": "tone", "label": "t"}]}).tasks[0].label == "t"


def test_the_grid_s_model_and_trainer_go_into_every_arm_and_patches_over_them():
    made = arms(built({"model": {"dtype": "bfloat16"}, "trainer": {"learning_rate": 0.5, "weight_decay": 0.1}}))
    assert {arm.model.dtype for arm in made.values()} == {"bfloat16"}
    untrained = {name: arm for name, arm in made.items() if arm.trainer["max_steps"] == 0}
    assert untrained and {tuple(arm.trainer) for arm in untrained.values()} == {("max_steps",)}
    assert {arm.trainer["weight_decay"] for name, arm in made.items() if name not in untrained} == {0.1}
    assert made["form=bias,init=zeros"].trainer["learning_rate"] == 0.5
    assert made["form=lora,init=-"].trainer["learning_rate"] == 1e-3


def test_draws_are_the_same_for_every_arm():
    # each searches around its own learning rate, by the same factors
    drawn = [draw(arm.budget, seed=3) for arm in built({"budget.trials": 5}).arms]
    assert len(drawn[0]) == 5 and all(one == drawn[0] for one in drawn)


def test_rates_that_are_listed_are_all_tried_with_every_number_of_steps():
    changes = {"budget.trials": 6, "budget.learning_rate": [0.3, 1, 3], "budget.steps": [2, 4]}
    drawn = draw(built(changes).arms[0].budget, seed=3)
    assert [(s.rate, s.steps) for s in drawn] == [(0.3, 2), (1, 2), (3, 2), (0.3, 4), (1, 4), (3, 4)]


# -- patches ----------------------------------------------------------------------------------------------------------


def test_a_patch_changes_what_it_names_and_keeps_the_rest():
    patch = {"adapter": {"layers": 0.25}, "trainer": {"learning_rate": 0.5}, "loss": {"contrast": "none"}}
    grid = factorial({"f": {"as_it_is": {}, "patched": patch}})
    plain, patched = arms(grid).values()
    base = load_arm("vector_dpo")
    assert plain.adapter == base.adapter and plain.loss == base.loss
    assert patched.adapter == base.adapter | {"layers": 0.25}
    assert patched.trainer == base.trainer | {"learning_rate": 0.5, "per_device_train_batch_size": 2}
    assert patched.loss_object() == get_loss("dpo", beta=0.1, contrast="none")


def test_another_adapter_or_loss_replaces_its_whole_table():
    lora = {"type": "lora", "r": 2, "target_modules": "all-linear"}
    grid = factorial({"f": {"lora": {"adapter": lora}, "ipo": {"loss": {"name": "ipo"}}}})
    made = arms(grid)
    base = load_arm("vector_dpo")
    assert made["f=lora"].adapter == lora and made["f=lora"].loss == base.loss
    assert made["f=ipo"].loss == {"name": "ipo"} and made["f=ipo"].adapter == base.adapter


def test_patches_of_several_factors_add_up_and_the_later_factor_wins():
    grid = factorial(
        {
            "depth": {"low": {"adapter": {"layers": 0.25}}, "high": {"adapter": {"layers": 0.75}}},
            "rate": {"own": {}, "fast": {"trainer": {"learning_rate": 1.0}, "adapter": {"norm": "preserve"}}},
            "last": {"no": {}, "yes": {"adapter": {"layers": 0.1}}},
        }
    )
    made = arms(grid)
    assert len(made) == 8
    chosen = made["depth=high,rate=fast,last=no"]
    assert (chosen.adapter["layers"], chosen.adapter["norm"], chosen.trainer["learning_rate"]) == (0.75, "preserve", 1)
    assert made["depth=high,rate=own,last=yes"].adapter["layers"] == 0.1
    assert "norm" not in made["depth=low,rate=own,last=no"].adapter


def test_of_a_list_the_first_entry_counts_whose_when_fits():
    rates = [
        {"when": {"form": ["b", "c"], "depth": "high"}, "trainer": {"learning_rate": 2.0}},
        {"when": {"form": "b"}, "trainer": {"learning_rate": 3.0}},
        {"trainer": {"learning_rate": 4.0}},
        {"when": {"form": "a"}, "trainer": {"learning_rate": 5.0}},
    ]
    forms, depths = {"a": {}, "b": {}, "c": {}}, {"low": {}, "high": {"adapter": {"layers": 0.75}}}
    grid = factorial({"form": forms, "depth": depths, "rate": {"own": {}, "given": rates}})
    found = {
        (levels["form"], levels["depth"]): arm.arm.trainer["learning_rate"]
        for arm in grid.arms
        if (levels := arm.levels) and levels["rate"] == "given"
    }
    assert found == {
        ("a", "low"): 4, ("a", "high"): 4, ("b", "low"): 3, ("b", "high"): 2, ("c", "low"): 4, ("c", "high"): 2,
    }  # fmt: skip


def test_inert_levels_of_several_factors_leave_one_arm():
    off = {"when": {"form": "none"}, "inert": True}
    grid = factorial(
        {
            "form": {"none": {"trainer": {"max_steps": 0}}, "bias": {}},
            "beta": {"small": [off, {"loss": {"beta": 0.1}}], "large": [off, {"loss": {"beta": 1.0}}]},
            "norm": {"free": [off, {}], "kept": [off, {"adapter": {"norm": "preserve"}}]},
        }
    )
    assert [arm.name for arm in grid.arms] == [
        "form=none,beta=-,norm=-",
        "form=bias,beta=small,norm=free",
        "form=bias,beta=small,norm=kept",
        "form=bias,beta=large,norm=free",
        "form=bias,beta=large,norm=kept",
    ]


ICV = {"adapter": {"init": "icv"}}


OFF = {"when": {"form": "icv"}, "inert": True}


FASTER = {"trainer": {"learning_rate": 9.0}}


LOSES_AN_ARM = {
    "inert, yet another level depends on it": {
        "form": {"bias": {}, "icv": ICV},
        "init": {"zeros": [OFF, {}], "mean": [OFF, {"adapter": {"init": "mean_difference"}}]},
        "rate": {"own": {}, "given": [{"when": {"init": "mean"}, **FASTER}, {}]},
    },
    "a level with the name of inert ones": {
        "form": {"bias": {}, "icv": ICV},
        "rate": {"-": FASTER, "own": [OFF, {}]},
    },
}


@pytest.mark.parametrize("factors", LOSES_AN_ARM.values(), ids=LOSES_AN_ARM)
def test_no_combination_is_dropped_for_another_arm_of_its_name(factors):
    with pytest.raises(ArmError, match="same name as another, .* but its arm differs|cannot name a level"):
        factorial(factors)


# -- designs ----------------------------------------------------------------------------------------------------------


FACTORS = {
    "form": {"bias": {}, "gated": {"adapter": {"form": "gated"}}},
    "norm": {"free": {}, "kept": {"adapter": {"norm": "preserve"}}},
    "contrast": {c: {"loss": {"contrast": c}} for c in ("paired", "unpaired", "none")},
}


START = {"form": "bias", "norm": "free", "contrast": "paired"}


END = {"form": "gated", "norm": "kept", "contrast": "none"}


def names(*points: str) -> list[str]:
    return [",".join(f"{f}={level}" for f, level in zip(FACTORS, point.split(), strict=True)) for point in points]


def design(kind: str, **options) -> Grid:
    return factorial(FACTORS, design={"kind": kind, **options})


def test_full_design():
    everything = [f"{form} {norm} {c}" for form in FACTORS["form"] for norm in FACTORS["norm"] for c in
                  FACTORS["contrast"]]  # fmt: skip
    grid = design("full")
    assert [arm.name for arm in grid.arms] == names(*everything)
    assert grid.notes == ["Full factorial: 12 combinations."]


def test_one_at_a_time_design():
    grid = design("one_at_a_time", start=START)
    assert [arm.name for arm in grid.arms] == names(
        "bias free paired", "gated free paired", "bias kept paired", "bias free unpaired", "bias free none"
    )
    assert grid.notes == ["one_at_a_time: 5 of 12 combinations; interactions are not estimated."]


def test_add_one_in_design():
    grid = design("add_one_in", start=START, end=END)
    assert [arm.name for arm in grid.arms] == names(
        "bias free paired", "gated free paired", "bias kept paired", "bias free none",
        "gated kept none", "bias kept none", "gated free none", "gated kept paired",
    )  # fmt: skip
    assert grid.notes == ["add_one_in: 8 of 12 combinations; interactions are not estimated."]
    # a factor that stays where it is adds nothing
    still = design("add_one_in", start=START, end={**START, "norm": "kept"})
    assert [arm.name for arm in still.arms] == names("bias free paired", "bias kept paired")


def test_fractional_design_has_every_pair_of_levels_once_and_says_what_is_aliased():
    two = {f: {level: FACTORS[f][level] for level in list(FACTORS[f])[:2]} for f in FACTORS}
    grid = factorial(two, design={"kind": "fractional", "reduction": 2})
    assert len(grid.arms) == 4
    for first, second in (("form", "norm"), ("form", "contrast"), ("norm", "contrast")):
        seen = [(a.levels[first], a.levels[second]) for a in grid.arms if a.levels]
        assert sorted(seen) == sorted((x, y) for x in two[first] for y in two[second])
    assert "4 of 8 combinations" in grid.notes[0]
    # half of a 2x2x2 design is of resolution III: every main effect is an interaction of the other two
    assert {re.sub(" cannot.*", "", note) for note in grid.notes[1:]} == {"form", "norm", "contrast"}


def test_arms_design_needs_no_factors():
    grid = built({"factors": DELETE, "design": DELETE, "claim": DELETE})
    assert [arm.name for arm in grid.arms] == ["mean_difference", "base"]
    assert grid.notes == []


# -- keys -------------------------------------------------------------------------------------------------------------


def cell(changes: Changes | None = None, arm: str = "form=bias,init=zeros", seed: int = 0, examples: int = 4) -> Cell:
    """The cell of an arm on the first task."""
    grid = built(changes)
    [found] = [
        c for c in grid.cells()
        if (c.arm.name, c.seed, c.examples, c.task.label) == (arm, seed, examples, grid.tasks[0].label)
    ]  # fmt: skip
    return found


DECIDES_ALL = {
    "budget trials": {"budget.trials": 3},
    "budget steps": {"budget.steps": [5]},
    "budget layers": {"budget.layers": [0.3], "budget.learning_rate": 3.0},
    "budget landings": {"budget.landings": 2},
    "strengths": {"budget.strengths": [1.0]},
    "learning rate": {"trainer.learning_rate": 0.3},
    "patched learning rate": {"factors.form.bias": {"trainer": {"learning_rate": 0.3}}},
    "adapter": {"factors.form.bias": {"adapter": {"layers": 0.3}}},
    "loss": {"factors.form.bias": {"loss": {"contrast": "none"}}},
    "pairing": {"factors.form.bias": {"data": {"pairing": "shuffled"}}},
    "base arm": {"base": "vector_ce"},
    "model": {"model": {"dtype": "bfloat16"}},
    "validation size": {"splits": {"validation": 8}},
    "near duplicates": {"splits": {"drop_near_duplicates": True}},
    "label": {"tasks": [{"name": "warm_tone", "label": "tone"}]},
    "draw": {"tasks": [{"name": "warm_tone", "label": "warm_tone", "draw": 1}]},
    "reverse": {"tasks": [{"name": "warm_tone", "label": "warm_tone", "reverse": True}]},
}


DECIDES_THE_RESULT = {
    "matched kl": {"matched": {"kl": 0.2}},
    "largest strength": {"matched": {"largest_strength": 8.0}},
    "scorer": {"tasks": [{"name": "warm_tone", "scorer": {"kind": "rule", "pattern": "warm"}}]},
    "generations": {"generations": 2},
    "new tokens": {"new_tokens": 8},
}


DECIDES_NOTHING = {
    "name": {"name": "other"},
    "card": {"card.problem": "Another one?"},
    "claim": {"claim.margin": 0.1},
    "threads": {"model": {"threads": 2}},
    "other arms": {"arms": []},
    "other seeds": {"seeds": [0, 5]},
    "other numbers of examples": {"examples": [4, 6]},
    "design": {"design": {"kind": "one_at_a_time", "start": {"form": "bias", "init": "zeros"}}, "claim": DELETE},
}


@pytest.mark.parametrize("changes", DECIDES_ALL.values(), ids=DECIDES_ALL)
def test_keys_change_with_what_decides_the_settings(changes):
    before, after = cell(), cell(changes)
    assert before.key != after.key and before.tuning_key != after.tuning_key


@pytest.mark.parametrize("changes", DECIDES_THE_RESULT.values(), ids=DECIDES_THE_RESULT)
def test_only_the_result_s_key_changes_with_what_is_measured(changes):
    before, after = cell(), cell(changes)
    assert before.key != after.key and before.tuning_key == after.tuning_key


@pytest.mark.parametrize("changes", DECIDES_NOTHING.values(), ids=DECIDES_NOTHING)
def test_keys_do_not_change_with_what_decides_nothing(changes):
    before, after = cell(), cell(changes)
    assert (before.key, before.tuning_key) == (after.key, after.tuning_key)


def test_keys_change_with_the_arm_the_examples_the_seed_and_the_test_size():
    assert cell().key == cell().key
    assert cell().key != cell(arm="form=lora,init=-").key
    assert cell().key != cell(examples=8).key
    assert cell().tuning_key != cell(examples=8).tuning_key
    assert cell().key != cell(seed=1).key
    assert cell().key != cell({"splits": {"test": 20}}).key


@pytest.mark.parametrize(("per", "same"), [("arm", True), ("cell", False)])
def test_settings_are_chosen_per_arm_or_per_cell(per, same):
    first, second = (cell({"budget.per": per}, seed=seed) for seed in (0, 1))
    assert (first.tuning_key == second.tuning_key) is same
    assert first.key != second.key


def test_settings_per_grid_are_those_of_the_first_task_and_the_middle_number_of_examples():
    tasks = [{"name": "warm_tone"}, {"name": "cautious_advice"}]
    changed = {"budget.per": "grid", "tasks": tasks, "examples": [4, 6, 8]}
    cells = built(changed).cells()
    for arm in {c.arm.name for c in cells}:
        own = [c for c in cells if c.arm.name == arm]
        assert len({c.tuning_key for c in own}) == len({c.tuning_file for c in own}) == 1
        assert len({c.key for c in own}) == len(own)
        [(task, examples, seed)] = {(c.tuned_at[0].label, *c.tuned_at[1:]) for c in own}
        assert (task, examples, seed) == ("warm_tone", 6, 0)
    more = built(changed | {"tasks": [*tasks, {"name": "warm_tone", "label": "again", "draw": 1}]}).cells()
    assert {c.path: c.key for c in cells}.items() <= {c.path: c.key for c in more}.items(), "a grid may grow"


def test_settings_per_arm_are_those_of_the_first_seed():
    assert cell({"seeds": [0, 1]}).tuning_key != cell({"seeds": [1, 0]}).tuning_key


def test_keys_change_with_the_neutral_text(tmp_path):
    for name in ("first", "second"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name}", "completion": "answer"}}\n')
    first, second = (cell({"neutral": str(tmp_path / f"{name}.jsonl")}) for name in ("first", "second"))
    assert first.key != second.key


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(file.stem for file in module.GRIDS.glob("*.toml")))
def test_every_grid_that_is_shipped_can_be_read(name):
    cells = load_grid(name).cells()
    assert len({cell.key for cell in cells}) == len({cell.path for cell in cells}) == len(cells)


def test_a_grid_file_is_named_after_itself(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(GRID.replace('name = "small"\n', ""))
    grid = load_grid(file)
    assert grid.tables.name == "mine"
    assert [c.key for c in grid.cells()] == [c.key for c in built().cells()]
    file.write_text(GRID)
    assert load_grid(str(file)).tables.name == "small"


def test_relative_tasks_start_at_the_data_root_and_keep_their_keys(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "warm_tone").mkdir()  # an embedded task of that name goes first
    file = tmp_path / "grid.toml"
    file.write_text(re.sub(r"tasks = .*", 'tasks = ["mine", "warm_tone", "nowhere"]', GRID))
    monkeypatch.chdir(tmp_path)
    rooted, plain = load_grid(file, data_root=tmp_path), load_grid(file)
    assert [task.name for task in rooted.tasks] == [str(tmp_path / "mine"), "warm_tone", "nowhere"]
    assert [task.label for task in rooted.tasks] == ["mine", "warm_tone", "nowhere"]
    assert [c.key for c in rooted.cells()] == [c.key for c in plain.cells()]


def test_unknown_and_broken_grid_files(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GRIDS", tmp_path)
    (tmp_path / "quick.toml").write_text(GRID)
    assert load_grid("quick").tables.name == "small"
    with pytest.raises(ArmError, match=r"'quik'.*\['quick'\].*Did you mean 'quick'"):
        load_grid("quik")
    with pytest.raises(ArmError, match=r"No grid .*nowhere\.toml"):
        load_grid(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("[card\n")
    with pytest.raises(ArmError, match=r"broken\.toml is not valid TOML"):
        load_grid("broken")
