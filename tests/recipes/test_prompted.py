"""Arms that are prompts: what they show, what that costs, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from measuring import margins
from tiny_grids import make_tables, run

from steertune.recipes import train
from steertune.recipes.ablation.context import Context, instructions
from steertune.recipes.ablation.grid import Cell, load_grid, make_grid
from steertune.recipes.ablation.sections.card import card_blocks
from steertune.recipes.ablation.tables import TaskTable, with_instructions
from steertune.recipes.lab.arm import load_arm
from steertune.recipes.lab.embedded import TASKS, task_names
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.observe import OBSERVERS
from steertune.recipes.lab.pages import Text

ARMS = ["prompt_instruction", "prompt_demonstrations", "prompt_both", "prompt_contrast", "base"]
INSTRUCTIONS = ["the dog runs", "we stay"]


@pytest.fixture
def tables(tmp_path: Path) -> dict:
    made = make_tables(tmp_path)
    made |= {
        "arms": ARMS,
        "design": {"kind": "arms"},
        "claim": {"better": "prompt_both", "than": "base", "measure": "accuracy", "strength": "tuned"},
    }
    made["tasks"][0] |= {"instructions": INSTRUCTIONS, "instructions_by": "This test, in a minute."}
    del made["factors"]
    return made


def cell_of(tables: dict, arm: str) -> tuple[Cell, Context]:
    grid = make_grid(tables)
    [found] = [cell for cell in grid.cells() if (cell.arm.name, cell.seed) == (arm, 1)]
    return found, Context(grid)


def prompts(cell: Cell, context: Context, choice: int = 0) -> list[str]:
    return context.show(cell, cell.seed, choice)(context.splits(cell.task).test)["prompt"]


def test_prompts_hold_what_they_say(tables):
    plain = None
    for arm in ARMS:
        cell, context = cell_of(tables, arm)
        splits = context.splits(cell.task)
        plain, training = splits.test["prompt"], splits.train(4, seed=1).to_list()
        seen = prompts(cell, context, choice=len(INSTRUCTIONS) - 1 if "instruction" in arm or "both" in arm else 0)
        for own, prompt in zip(plain, seen, strict=True):
            assert own.strip() in prompt and (prompt == own) == (arm == "base")
            assert (INSTRUCTIONS[1] in prompt.split("\n\n")) == (arm in ("prompt_instruction", "prompt_both"))
            shows = [row for row in training if f"{row['prompt'].strip()}" in prompt]
            if arm in ("prompt_demonstrations", "prompt_both", "prompt_contrast"):
                assert len(shows) == 4 and all(row["chosen"].strip() in prompt for row in shows)
            if arm == "prompt_contrast":
                assert prompt.endswith("Good response: ")
                assert all(f"Bad response: {row['rejected'].strip()}" in prompt for row in shows)


def test_demonstrations_are_training_rows_of_the_seed_and_never_test_rows(tables):
    cell, context = cell_of(tables, "prompt_demonstrations")
    splits = context.splits(cell.task)
    training = set(splits.train(4, seed=cell.seed)["prompt"])
    assert not training & {*splits.test["prompt"], *splits.validation["prompt"]}
    shows = {part for prompt in prompts(cell, context) for part in prompt.split("\n\n")[:-1]}
    assert len(shows) == 4 and all(any(part.startswith(t.rstrip()) for t in training) for part in shows)


def test_fewer_demonstrations_are_shown_where_there_are_no_more(tables):
    tables |= {"arms": ["prompt_few_shot", "base"], "examples": [2, 8]}
    tables["claim"] |= {"better": "prompt_few_shot"}
    grid = make_grid(tables)
    context = Context(grid)
    counts = {}
    for cell in grid.cells():
        if cell.arm.name == "prompt_few_shot":
            training = context.splits(cell.task).train(cell.examples, cell.seed)["prompt"]
            counts[cell.examples] = {
                sum(row.strip() in prompt for row in training) for prompt in prompts(cell, context)
            }
    assert counts == {2: {2}, 8: {4}}


def test_the_added_tokens_are_counted(tables):
    cell, context = cell_of(tables, "prompt_instruction")
    for choice, instruction in enumerate(INSTRUCTIONS):
        assert context.prompt_tokens(cell, context.show(cell, 1, choice)) == len(instruction.split())


def test_the_tuning_chooses_the_instruction_on_validation_rows(tables, tmp_path, monkeypatch):
    original = OBSERVERS["pairs"].look

    def prefers_the_second(model, held_out, strengths):
        observed = original(model, held_out, strengths)
        told = INSTRUCTIONS[1] in held_out.pairs["prompt"][0]
        for values in observed.values():
            values["chosen_logp"] = [logp + (1 if told else -1) for logp in values["rejected_logp"]]
        return observed

    monkeypatch.setitem(OBSERVERS, "pairs", OBSERVERS["pairs"]._replace(look=prefers_the_second))
    cells = {cell["arm"]: cell for cell in run(tables | {"seeds": [0]}, tmp_path / "run")}
    told = cells["prompt_instruction"]
    assert [trial["prompt"] for trial in told["tuning"]] == [0, 1] and told["setting"]["prompt"] == 1
    assert told["accuracy"] == 1 and told["prompt_tokens"] == len(INSTRUCTIONS[1].split())
    shots = cells["prompt_demonstrations"]
    assert len(shots["tuning"]) == 1
    for cell in (told, shots):
        assert cell["parameters"] == cell["steps"] == 0 and cell["kl"] > 0 and not cell["scalable"]
        assert "matched_accuracy" not in cell, "a prompt has no strength"


def test_prompting_leaves_the_base_alone(tables, tmp_path):
    """Nothing is put on the shared model: the base's own cell comes out as without prompting arms."""
    both = run(tables | {"seeds": [0]}, tmp_path / "both")
    claim = {"better": "mean_difference", "than": "base", "measure": "accuracy", "strength": "tuned"}
    alone = run(tables | {"seeds": [0], "arms": ["base", "mean_difference"], "claim": claim}, tmp_path / "a")
    [mine] = [cell for cell in both if cell["arm"] == "base"]
    assert mine["margins"] == alone[0]["margins"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"examples": [3]}, r"shows 4 demonstrations, but examples=\[3\]"),
        ({"tasks": "none"}, r"task 'task' has instructions=\[\]"),
        ({"tasks": "blank"}, r"instructions=\['  '\]"),
        ({"tasks": "many"}, "not more than the 2 trials of the budget"),
        ({"per": "grid"}, "budget.per='grid' chooses one for all tasks"),
    ],
)
def test_prompts_that_cannot_be_filled_are_refused(changes, message, tables):
    kinds = {"none": [], "blank": ["  "], "many": ["a", "b", "c"]}
    if "tasks" in changes:
        tables["tasks"][0]["instructions"] = kinds[changes["tasks"]]
    elif "per" in changes:
        tables["tasks"].append(tables["tasks"][0] | {"label": "another", "draw": 1})
        tables["budget"]["per"] = changes["per"]
    else:
        tables |= changes
    with pytest.raises(ArmError, match=message):
        make_grid(tables)


def test_a_prompt_longer_than_the_context_is_refused(tables):
    tables["tasks"][0]["instructions"] = ["the dog runs " * 200]
    cell, context = cell_of(tables, "prompt_instruction")
    with pytest.raises(ArmError, match=r"take \d+ tokens, the model reads 512"):
        prompts(cell, context)


def test_an_answer_beyond_the_context_is_refused(tables):
    cell, context = cell_of(tables, "prompt_demonstrations")
    test = context.splits(cell.task).test
    long = test.map(lambda row: {"rejected": "sea " * 512})
    show = context.show(cell, 1)
    show(test)
    with pytest.raises(ArmError, match=r"take \d+ tokens, the model reads 512"):
        show(long)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt.demonstrations=0", "--prompt.contrast=true"], "Set prompt.demonstrations"),
        (["--prompt.demonstrations=0", "--prompt.contrast=false", "--prompt.fewer=true"], "fewer is about demonstr"),
        (["--trainer.max_steps=4"], "trains nothing"),
        (["--adapter.type=lora"], "trains nothing"),
    ],
)
def test_arms_that_contradict_themselves(words, message):
    with pytest.raises(ArmError, match=message):
        load_arm("prompt_contrast", words)


def test_the_training_recipe_refuses_a_prompt(capsys):
    assert train.main(["prompt_contrast"]) == 2
    assert "is a prompt, so there is nothing to train" in capsys.readouterr().err


def test_views_that_show_more_than_there_is_are_refused_before_anything_runs(tables):
    tables |= {"arms": ["vector_dpo", "lora_ia2"], "claim": {"better": "lora_ia2", "than": "vector_dpo"}}
    make_grid(tables)
    with pytest.raises(ArmError, match=r"'lora_ia2' shows 3 other examples at its view 'good', but examples=\[3\].*4"):
        make_grid(tables | {"examples": [3]})


def test_instructions_have_an_author(tables, tmp_path):
    task = tables["tasks"][0]
    task["instructions_by"] = " "
    with pytest.raises(ArmError, match="instructions without an author.*with which budget"):
        make_grid(tables)
    del task["instructions"], task["instructions_by"]
    file = Path(task["name"]) / "instructions.toml"
    file.write_text('by = "A file."\ninstructions = ["we stay"]')
    grid = make_grid(tables)
    assert instructions(next(cell for cell in grid.cells() if cell.arm.name == "prompt_both")) == ["we stay"]
    [kept] = grid.tables.tasks
    assert isinstance(kept, TaskTable) and kept.instructions_by == "A file."
    [*_, said] = card_blocks(grid.card, grid.tables.claim, grid.tables.tasks)
    assert isinstance(said, Text) and "- `task`: A file. “we stay”" in said.markdown
    file.write_text('author = "A file."')
    with pytest.raises(ArmError, match="Unknown key 'author'"):
        make_grid(tables)


def test_grids_without_prompting_arms_leave_instructions_alone(tables):
    tables |= {"arms": ["base", "mean_difference"]}
    tables["claim"] |= {"better": "mean_difference"}
    tables["tasks"][0]["instructions_by"] = ""
    assert make_grid(tables).tasks[0].instructions == INSTRUCTIONS


@pytest.mark.parametrize("name", task_names())
def test_embedded_tasks_bring_instructions(name):
    task = with_instructions(TaskTable(name=name), TASKS / name)
    assert len(task.instructions) == len(set(task.instructions)) >= 3 and "none was tried" in task.instructions_by
    reverse = with_instructions(TaskTable(name=name, reverse=True), TASKS / name)
    assert reverse.instructions == [], "they ask for the chosen answers"


def test_base_models_are_prompted_with_plain_text(tables, tmp_path):
    (tmp_path / "model" / "chat_template.jinja").unlink()
    for arm in ARMS:
        cell, context = cell_of(tables, arm)
        assert getattr(context.tokenizer, "chat_template", None) is None
        show = context.show(cell, 1)
        rows = show(context.splits(cell.task).test)
        assert all(isinstance(prompt, str) for prompt in rows["prompt"])
        assert np.isfinite(margins(context.model, context.tokenizer, rows)).all()
        assert (context.prompt_tokens(cell, show) > 0) == (arm != "base")


@pytest.mark.parametrize("name", ["contrast", "augmentation", "prompting"])
def test_shipped_grids_are_valid(name):
    assert load_grid(name).cells()
