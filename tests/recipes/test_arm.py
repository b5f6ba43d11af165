"""Arms: every shipped one is valid, overrides are TOML, and whatever is wrong is named."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

import pytest
import readme
from peft import LoraConfig
from tiny_data import pairs, tokenizer
from tiny_models import tiny
from trl import DPOConfig

from steertune import losses
from steertune.adapters import SteeringVectorConfig
from steertune.losses.dpo import DPO
from steertune.recipes.lab import augmentation as augmentation
from steertune.recipes.lab.arm import ARMS, ArmError, load_arm, parse_arm
from steertune.recipes.lab.data import load_splits
from steertune.recipes.lab.training import make_trainer
from steertune.trainers import inductive_biases, views


@pytest.mark.parametrize("file", sorted(ARMS.glob("*.toml")), ids=lambda file: file.stem)
def test_shipped_arms_are_valid(file: Path, tmp_path: Path) -> None:
    arm = load_arm(file.stem)
    arm.training_arguments(DPOConfig, str(tmp_path), bf16=False, use_cpu=True)
    train, test = load_splits(arm.data)
    assert (len(train), len(test)) == (arm.data.train, arm.data.test)


def test_everything_has_an_arm() -> None:
    arms = [tomllib.loads(file.read_text()) for file in ARMS.glob("*.toml")]
    seen_views = {view.get("name", key) for arm in arms for key, view in arm.get("views", {}).items()}
    named = {arm["loss"]["name"] for arm in arms if "loss" in arm}
    assert readme.rows("loss") <= named <= {*losses.names(), "upstream"}
    assert {arm["adapter"].get("init") for arm in arms} >= readme.rows("direction")
    assert {name for arm in arms for name in arm.get("biases", {})} == {*inductive_biases.names()}
    assert {arm.get("loss", {}).get("contrast") for arm in arms} >= {"none", "unpaired", "difference"}
    assert "shuffled" in {arm["data"].get("pairing") for arm in arms}
    assert seen_views == {*views.names()}
    assert {arm["augmentation"]["name"] for arm in arms if "augmentation" in arm} == {*augmentation.names()} - {
        "function"
    }


def test_views_that_the_loss_does_not_see(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text((ARMS / "vector_distillation.toml").read_text().replace('"context_distillation"', '"dpo"'))
    with pytest.raises(
        ArmError, match=r"\[views\] \['good'\] of arm 'mine' are seen by nobody: its loss asks for \[\]"
    ):
        load_arm(str(file))
    arm = load_arm("vector_neutral_dpo", ["--loss={name='cross_entropy'}", "--trainer.max_steps=1"])
    made = make_trainer(arm, tiny(), tokenizer(), pairs(4), tmp_path, save_strategy="no", disable_tqdm=True)
    assert made.views is None, "left over by an override of the loss"


def test_apo_is_trls_own(tmp_path: Path) -> None:
    arm = load_arm("vector_apo")
    arguments = arm.training_arguments(DPOConfig, str(tmp_path), bf16=False, use_cpu=True)
    assert arm.loss_object() is None and (arguments.loss_type, arguments.beta) == (["apo_zero"], 0.1)


def test_overrides_have_toml_types() -> None:
    words = ["--adapter.layers=[3, 0.5]", "--adapter.norm", "preserve", "--data.train", "7", "--loss.beta=1e-1"]
    arm = load_arm("vector_dpo", words)
    config = arm.peft_config()
    assert isinstance(config, SteeringVectorConfig)
    assert (config.layers, config.norm, arm.data.train) == ([3, 0.5], "preserve", 7)
    assert arm.loss_object() == DPO(beta=0.1)


def test_any_peft_method_is_an_adapter() -> None:
    assert isinstance(load_arm("lora_dpo", ["--adapter.r", "1"]).peft_config(), LoraConfig)
    assert load_arm("vector_dpo", ["--adapter", "{type = 'none'}"]).peft_config() is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adpter.layers", "3"], "Did you mean 'adapter'"),
        (["--adapter.layer", "3"], "Did you mean 'layers'"),
        (["--adapter.type", "lorra"], "Did you mean 'lora'"),
        (["--loss.name", "dpoo"], "Did you mean 'dpo'"),
        (["--loss.betta", "1"], "Did you mean 'beta'"),
        (["--data.trian", "3"], "Did you mean 'train'"),
        (["--data.train", "0"], "greater than or equal to 1"),
        (["--data.train", "many"], "data.train"),
        (["--adapter.rank", "two"], "adapter.rank='two'"),
        (["--model.dtype", "float8"], "model.dtype"),
        (["--data.train"], "has no value"),
        (["data.train"], "overrides are written"),
    ],
)
def test_wrong_overrides_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_arm("vector_dpo", words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.learning_rat", "1"], "Did you mean 'learning_rate'"),
        (["--trainer.learning_rate", "fast"], "learning_rate='fast'"),
        (["--trainer.max_steps", "1.5"], "max_steps=1.5"),
    ],
)
def test_wrong_training_arguments_are_named(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArmError, match=message):
        load_arm("vector_dpo", words).training_arguments(DPOConfig, str(tmp_path))


def test_unknown_arm_and_broken_file(tmp_path: Path) -> None:
    with pytest.raises(ArmError, match="Did you mean 'vector_dpo'"):
        load_arm("bias_dp")
    broken = tmp_path / "broken.toml"
    broken.write_text("[data\n")
    with pytest.raises(ArmError, match="not valid TOML"):
        load_arm(broken)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.train", "100000"], "100000 rows asked"),
        (["--data.name", "./nowhere"], "no such file"),
        (["--data.test_split", "tset"], "expected, found"),
    ],
)
def test_data_that_is_not_there(words: list[str], message: str) -> None:
    with pytest.raises(ArmError, match=message):
        load_splits(load_arm("vector_dpo", words).data)


def test_smaller_sets_are_subsets_and_the_test_set_does_not_move() -> None:
    few, test = load_splits(load_arm("vector_dpo", ["--data.train", "4", "--data.seed", "1"]).data)
    more, same = load_splits(load_arm("vector_dpo", ["--data.train", "16", "--data.seed", "1"]).data)
    other, still = load_splits(load_arm("vector_dpo", ["--data.train", "16", "--data.seed", "2"]).data)
    assert few.to_list() == more.to_list()[:4] != other.to_list()[:4]
    assert test.to_list() == same.to_list() == still.to_list()


def test_local_csv_and_parquet(tmp_path: Path) -> None:
    train, _ = load_splits(load_arm("vector_dpo", ["--data.train", "5"]).data)
    plain = train.map(lambda row: {c: row[c][0]["content"] for c in ("prompt", "chosen", "rejected")})
    plain.to_csv(tmp_path / "train.csv")
    plain.to_parquet(tmp_path / "test.parquet")
    words = [f"--data.name={tmp_path}", "--data.train=5", "--data.test=3"]
    read, test = load_splits(load_arm("vector_dpo", words).data)
    assert sorted(read["prompt"]) == sorted(plain["prompt"])
    assert test.to_list() == plain.select(range(3)).to_list()


@pytest.mark.parametrize(
    ("words", "arm", "overrides"),
    [
        ([], "vector_dpo", []),
        (["--model.threads", "1"], "vector_dpo", ["--model.threads", "1"]),
        (
            ["lora_dpo", "--adapter.r", "1", "--json", "--data.seed=2"],
            "lora_dpo",
            ["--adapter.r", "1", "--data.seed=2"],
        ),
        (["--json", "--trainer.max_steps", "4"], "vector_dpo", ["--trainer.max_steps", "4"]),
    ],
)
def test_the_value_of_an_override_is_no_arm(words, arm, overrides):
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    options, rest = parse_arm(parser, words, "vector_dpo")
    assert (options.arm, rest, options.json) == (arm, overrides, "--json" in words)
