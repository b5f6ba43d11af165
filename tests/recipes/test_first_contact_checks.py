"""Checks before work, and what a run leaves that was refused or failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_data
import torch
from tiny_models import steered, tiny

import steertune.recipes.train as recipe
from steertune.recipes.chat import Chat
from steertune.recipes.lab import training
from steertune.recipes.lab.arm import load_arm
from steertune.recipes.lab.checks import check_adapters, skeleton
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.generation import check_strength, generate
from steertune.recipes.lab.tables import ModelTable
from steertune.trainers import NonFiniteError

SIZES: dict[str, Any] = dict(vocab_size=len(tiny_data.SPECIAL + tiny_data.WORDS), max_position_embeddings=512)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Overrides of a short run on a tiny local model."""
    options = {"trainer.max_steps": 2, "evaluation.generations": 0, "evaluation.strengths": "[0, 1]"}
    return tiny_data.save_run(tmp_path, 4, options, max_position_embeddings=512)


def test_the_skeleton_has_the_shape_and_no_weights(words, tmp_path):
    bare = skeleton(ModelTable(name=str(tmp_path / "model")))
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    assert {n: p.shape for n, p in bare.named_parameters()} == {
        n: p.shape for n, p in tiny(max_position_embeddings=512).named_parameters()
    }


@pytest.mark.parametrize("name", ["vector_dpo", "lora_dpo", "ia3_dpo", "ln_tuning_dpo", "vector_rahf"])
def test_the_skeleton_takes_every_shipped_adapter(name, words, tmp_path):
    check_adapters([load_arm(name, [f"--model.name={tmp_path / 'model'}"])])


def test_training_that_moves_nothing_is_an_error_and_leaves_no_folder(words, tmp_path):
    with pytest.raises(ArmError, match="2 steps changed no trained parameter.*learning_rate=1e-60"):
        recipe.run(load_arm("vector_dpo", [*words, "--trainer.learning_rate=1e-60"]))
    assert not (tmp_path / "run").exists()
    recipe.run(load_arm("vector_dpo", words))  # the corrected command has its folder


def test_a_diverged_vector_is_an_error_and_leaves_no_folder(words, tmp_path):
    """Its states are zeros behind the next norm: answers of nothing at a small KL, which no page could tell."""
    with pytest.raises(ArmError, match="length of .*e.* the training has diverged. Lower trainer.learning_rate"):
        recipe.run(load_arm("vector_dpo", [*words, "--trainer.learning_rate=1e30"]))
    assert not (tmp_path / "run").exists()


def test_no_weights_are_read_for_an_arm_that_does_not_fit(words, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "load_model", lambda table: pytest.fail("the model was loaded"))
    for wrong, says in {
        "--adapter.layers=99": "layer 99 does not exist",
        "--trainer.optim=adamx": "adamx is not a valid",
        "--trainer.max_steps=0": "trains nothing",
        "--trainer.learning_rate=0": "learning_rate=0 trains nothing",
    }.items():
        with pytest.raises(ArmError, match=says):
            recipe.run(load_arm("vector_dpo", [*words, wrong]))
    assert not (tmp_path / "run").exists()


def test_a_folder_is_kept_as_soon_as_there_is_something_to_go_on_from(tmp_path):
    arm = load_arm("vector_dpo")
    for file, left in (("metrics.jsonl", False), ("checkpoints/checkpoint-2/trainer_state.json", True)):
        folder = tmp_path / file.replace("/", "-")

        def fails(folder: Path = folder, file: str = file) -> None:
            with training.claimed(folder, arm):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).touch()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fails()
        assert folder.exists() == left


def test_a_default_folder_is_named_by_the_data_without_the_files_suffix():
    names = {task: training.default_folder("arm", task).name for task in ("./my/pairs.jsonl", "org/set.v2", "pairs")}
    assert [*names.values()] == ["arm-my-pairs", "arm-org-set.v2", "arm-pairs"]


def test_a_default_folder_has_a_name_that_file_systems_take():
    names = [training.default_folder("arm", "a" * 5000 + end).name for end in "bc"]
    assert max(map(len, names)) < 100 and names[0] != names[1]


def test_a_model_that_computes_no_numbers_has_no_answer():
    model = steered(tiny(**SIZES), layers=[1])
    with torch.no_grad():
        model.get_base_model().lm_head.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="has no answer"):
        generate(model, tiny_data.tokenizer(), ["the cat"], 3)
    chat = Chat(model, tiny_data.tokenizer(template=None), 1.0, 3, 0.0)
    assert all("no answer: NonFiniteError" in line for line in chat.talk(["the cat", "a dog"]))


@pytest.mark.parametrize("strength", [1e38, -1e38, 1e308])
def test_a_strength_that_no_state_holds_is_an_error(strength):
    model = steered(tiny(**SIZES), layers=[1])
    with pytest.raises(ArmError, match="times a vector of length"):
        check_strength(model, strength)
    with pytest.raises(ArmError, match="times a vector of length"):
        Chat(model, tiny_data.tokenizer(), strength, 3, 0.0)
    chat = Chat(model, tiny_data.tokenizer(), 1.0, 3, 0.0)
    assert "times a vector of length" in next(iter(chat.talk([f"/strength {strength}"])))
    assert chat.strength == 1.0


def test_a_template_of_a_task_file_reaches_the_row_alone():
    utils = pytest.importorskip("lm_eval.utils")
    from jinja2.exceptions import SecurityError

    from steertune.recipes.lab.task_files import sandboxed

    with sandboxed():
        assert utils.apply_template("{{ text | upper }}", {"text": "cat"}) == "CAT"
        for reach in ("{{ cycler.__init__.__globals__ }}", "{{ ''.__class__.__mro__ }}"):
            with pytest.raises(SecurityError):
                utils.apply_template(reach, {})
    assert "Sandbox" not in type(utils.env).__name__
