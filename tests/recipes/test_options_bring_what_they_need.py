"""An option on the command line works by itself, or one sentence says which other option it needs."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import tiny_data
from datasets import Dataset
from tiny_models import tiny

import steertune.recipes.train as recipe
from steertune.losses import options_of
from steertune.recipes.lab.arm import load_arm
from steertune.recipes.lab.checks import check_loss
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.ingredients.views import Views
from steertune.recipes.lab.training import make_trainer, training_of


def test_a_kl_on_neutral_text_brings_the_neutral_text(tmp_path: Path) -> None:
    arm = load_arm("vector_dpo", ["--loss.neutral_kl=0.5"])
    assert arm.get(Views).tables == load_arm("vector_neutral_dpo").get(Views).tables == {"neutral": {}}
    training = training_of(arm, tiny(), tiny_data.tokenizer(), tiny_data.pairs(4), tmp_path)
    trainer = make_trainer(training, save_strategy="no", max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_text_of_ones_own_is_kept() -> None:
    rows = [{"prompt": "a ", "completion": "b"}]
    arm = load_arm("vector_dpo", ["--loss.neutral_kl=0.5", '--views.neutral.rows=[{prompt="a ", completion="b"}]'])
    assert arm.get(Views).tables == {"neutral": {"rows": rows}}


@pytest.mark.parametrize("loss", ["lorra", "prompted", "context_distillation"])
def test_a_missing_instruction_is_named_before_a_model_is_loaded(
    loss: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe, "load_model", lambda table: pytest.fail("the model was loaded"))
    assert recipe.main(["vector_dpo", f"--loss.name={loss}"]) == 2
    assert "--views.good.name instruction --views.good.text" in capsys.readouterr().err
    views = [f"--views.{view}.{key}" for view in ("good", "bad") for key in ("name=instruction", "text=Be kind.")]
    assert load_arm("vector_dpo", [f"--loss.name={loss}", *views]).loss == {"name": loss}


def test_another_loss_leaves_behind_what_only_the_arms_own_loss_has() -> None:
    assert load_arm("vector_dpo", ["--loss.name=cross_entropy"]).loss == {"name": "cross_entropy"}
    assert load_arm("vector_dpo", ["--loss.name=upstream"]).loss == {"name": "upstream"}
    assert load_arm("vector_neutral_dpo", ["--loss.name=ipo"]).loss["neutral_kl"] == 1.0
    assert load_arm("vector_dpo", ["--loss.name=simpo"]).loss.keys() <= {"name", *options_of("simpo")}
    # what was given on the command line is never dropped
    with pytest.raises(ArmError, match="beta"):
        load_arm("vector_dpo", ["--loss.beta=0.2", "--loss.name=cross_entropy"])
    with pytest.raises(ArmError, match="Did you mean 'simpo'"):
        load_arm("vector_dpo", ["--loss.name=simp"])


def test_another_adapter_leaves_behind_what_only_the_arms_own_adapter_has() -> None:
    assert load_arm("vector_dpo", ["--adapter.type=lora", "--adapter.r=4"]).adapter == {"type": "lora", "r": 4}
    assert load_arm("vector_dpo", ["--adapter.type=none"]).adapter == {"type": "none"}
    assert load_arm("vector_dpo", ["--adapter.type=steering_vector"]).adapter == load_arm("vector_dpo").adapter
    with pytest.raises(ArmError, match="layers"):
        load_arm("vector_dpo", ["--adapter.type=lora", "--adapter.layers=3"])


DEMONSTRATIONS = Dataset.from_dict({"prompt": ["a "], "completion": ["b"]})
PAIRS = Dataset.from_dict({"prompt": ["a "], "chosen": ["b"], "rejected": ["c"]})


@pytest.mark.parametrize(
    ("arm", "words", "rows", "message"),
    [
        ("vector_dpo", [], DEMONSTRATIONS, "no rejected answers .*--loss.name cross_entropy"),
        (
            "vector_sft",
            ["--adapter.init=mean_difference"],
            DEMONSTRATIONS,
            "no rejected .*--adapter.init zeros",
        ),
        ("vector_dpo", ["--loss.name=reps", "--adapter.type=lora"], PAIRS, "--loss.suppress negative"),
        ("vector_dpo", ["--loss.name=reps", "--adapter.form=gated"], PAIRS, "--loss.suppress negative"),
        ("vector_dpo", ["--loss.name=bipo", "--adapter.type=ia3"], PAIRS, "needs an adapter that has a strength"),
    ],
)
def test_what_a_loss_lacks_is_said_before_a_model_is_loaded(
    arm: str, words: list[str], rows: Dataset, message: str
) -> None:
    with pytest.raises(ArmError, match=message):
        check_loss(load_arm(arm, words), rows)


def test_what_has_everything_is_not_refused() -> None:
    check_loss(load_arm("vector_sft"), DEMONSTRATIONS)
    check_loss(load_arm("vector_dpo", ["--loss.name=reps"]), PAIRS)
    check_loss(load_arm("vector_dpo", ["--loss.name=reps", "--loss.suppress=negative", "--adapter.type=lora"]), PAIRS)


def test_the_default_arm_learns_the_answers_of_an_embedded_task() -> None:
    arm = load_arm(inspect.signature(recipe.main).parameters["arm"].default)
    assert (arm.name, arm.data.name, arm.loss) == ("vector_sft", "lower_case", {"name": "cross_entropy"})
