"""Arms: every shipped one is valid, overrides are TOML, and whatever is wrong is named."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import readme
from peft import LoraConfig
from tiny_data import pairs, tokenizer
from tiny_grids import GRID
from tiny_models import tiny
from trl import DPOConfig

from steertune import losses
from steertune.adapters import SteeringVectorConfig
from steertune.losses.dpo import DPO
from steertune.recipes.ablation.grid import make_grid
from steertune.recipes.lab import augmentation as augmentation
from steertune.recipes.lab.arm import load_arm
from steertune.recipes.lab.arm_files import ARMS, read_tables
from steertune.recipes.lab.data import load_splits
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.ingredients.augmentation import Augmentation
from steertune.recipes.lab.ingredients.inductive_biases import InductiveBiases
from steertune.recipes.lab.ingredients.views import Views
from steertune.recipes.lab.training import make_trainer, training_of
from steertune.trainers import inductive_biases, views


@pytest.mark.parametrize("file", sorted(ARMS.glob("*.toml")), ids=lambda file: file.stem)
def test_shipped_arms_are_valid(file: Path, tmp_path: Path) -> None:
    arm = load_arm(file.stem)
    arm.training_arguments(DPOConfig, str(tmp_path), bf16=False, use_cpu=True)
    train, test = load_splits(arm.data)
    assert (len(train), len(test)) == (arm.data.train * arm.data.times, arm.data.test)


def _works_as_it_is(bias: str) -> bool:
    try:
        return bool(inductive_biases.get_bias(bias))
    except TypeError:
        return False


def test_everything_has_an_arm() -> None:
    arms = [read_tables(file) for file in ARMS.glob("*.toml")]
    seen_views = {view.get("name", key) for arm in arms for key, view in arm.get("views", {}).items()}
    # what the README's tables name has an arm; something new needs no entry there, and so no arm
    named = {arm["loss"]["name"] for arm in arms if "loss" in arm}
    assert readme.rows("loss") | {"upstream"} <= named <= {*losses.names(), "upstream"}
    assert {arm["adapter"].get("init") for arm in arms} >= readme.rows("direction")
    biases = {name for arm in arms for name in arm.get("inductive_biases", {})}
    # those that need a vector or a text of the user's have no arm
    assert {*filter(_works_as_it_is, inductive_biases.names())} <= biases <= {*inductive_biases.names()}
    assert {arm.get("loss", {}).get("contrast") for arm in arms} >= {"none", "unpaired", "difference"}
    assert "shuffled" in {arm["data"].get("pairing") for arm in arms}
    assert seen_views == {*views.names()}
    assert {arm["augmentation"]["name"] for arm in arms if "augmentation" in arm} == {*augmentation.names()} - {
        "function"
    }


def resolved(file: str | Path) -> dict[str, Any]:
    """What an arm and its parents say, with the defaults of `[data]`, which only some of them state."""
    tables = read_tables(file)
    del tables["name"]
    return {**tables, "data": {"train": 32, "test": 40, **tables["data"]}}


def test_shipped_arms_resolve_to_what_cells_were_keyed_by() -> None:
    expected = json.loads((Path(__file__).parent / "resolved_arms.json").read_text())
    for name, tables in expected.items():
        assert resolved(name) == tables, name
        for table in ("inductive_biases", "views", "teachers"):  # their order counts
            assert [*resolved(name).get(table, {})] == [*tables.get(table, {})], name


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)


def test_an_arm_that_extends_another_states_what_differs(tmp_path: Path) -> None:
    write(
        tmp_path,
        parent='name = "theirs"\nextends = "lora_dpo"\noutput.folder = "runs/theirs"\n[inductive_biases.rank_one]\n',
        child='extends = "parent.toml"\n[adapter]\nr = 2\n[loss]\nname = "simpo"\n'
        "[trainer]\nmax_steps = {}\n[inductive_biases]\n",
    )
    child, lora = load_arm(tmp_path / "child.toml"), load_arm("lora_dpo")
    assert (child.name, child.output.folder) == ("child", None), "an arm's own"
    assert child.data == lora.data
    assert child.adapter == {**lora.adapter, "r": 2}, "key by key"
    assert child.loss == {"name": "simpo"}, "another loss has other options"
    assert child.trainer == {key: value for key, value in lora.trainer.items() if key != "max_steps"}, "the default"
    assert not child.get(InductiveBiases), "an empty table replaces"


def test_a_view_of_another_kind_replaces_the_inherited_one(tmp_path: Path) -> None:
    write(tmp_path, child='extends = "vector_distillation"\n[views.good]\nname = "demonstrations"\nk = 2\n')
    assert load_arm(tmp_path / "child.toml").get(Views).tables == {"good": {"name": "demonstrations", "k": 2}}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": 'extends = "a.toml"'}, "circle: a -> a. Remove"),
        ({"a": 'extends = "b.toml"', "b": 'extends = "c.toml"', "c": 'extends = "b.toml"'}, "circle: b -> c -> b"),
        ({"a": 'extends = "b.toml"'}, r"a.toml: extends='b.toml' does not exist"),
        ({"a": 'extends = "vector_dop"'}, r"extends='vector_dop' does not exist.*Did you mean 'vector_dpo'"),
        ({"a": 'extends = ["vector_dpo"]'}, r"extends must be a string \(got \['vector_dpo'\]\)"),
        ({"a": 'extends = "b.toml"', "b": "[data"}, "b.toml is not valid TOML"),
        ({"a": 'extends = "vector_dpo"\n[adapter]\nlayer = 3'}, "Did you mean 'layers'"),
    ],
)
def test_what_an_arm_cannot_extend(files: dict[str, str], message: str, tmp_path: Path) -> None:
    write(tmp_path, **files)
    with pytest.raises(ArmError, match=message):
        load_arm(tmp_path / "a.toml")


def test_a_cells_key_does_not_depend_on_how_its_arm_is_written(tmp_path: Path) -> None:
    write(tmp_path, child='extends = "lora_capped_dpo"\nname = "arm"\n')
    write(tmp_path, whole="name = 'arm'\n" + "".join(toml(resolved("lora_capped_dpo"))))
    tables = {"name": "g", "tasks": ["warm_tone"], "examples": [8], "seeds": [0]}
    claim = {"better": "arm", "than": "base", "measure": "accuracy", "strength": "tuned"}
    tables |= {"card": tomllib.loads(GRID)["card"], "claim": claim}

    def keys(file: str) -> list[str]:
        grid = make_grid({**tables, "arms": [str(tmp_path / file), "base"]})
        return [cell.key for cell in grid.cells()]

    assert keys("child.toml") == keys("whole.toml")


def toml(tables: dict[str, Any]) -> Iterator[str]:
    """Lines of TOML, for tables of numbers and strings."""
    for name, table in tables.items():
        yield f"[{name}]\n"
        yield from (f"{key} = {json.dumps(value)}\n" for key, value in table.items())


def test_former_names_work_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="'bias_dpo' is now called 'vector_dpo'"):
        assert load_arm("bias_dpo") == load_arm("vector_dpo")
    write(tmp_path, old='extends = "lora_templates_dpo"\n[proliferation]\ntimes = 4\n')
    four_times = Augmentation.model_validate({"name": "templates", "times": 4})
    with pytest.warns(FutureWarning, match=r"\[proliferation\] is now called \[augmentation\]"):
        assert load_arm(tmp_path / "old.toml").get(Augmentation) == four_times
    with pytest.warns(FutureWarning, match=r"\[augmentation\]"):
        assert load_arm("lora_templates_dpo", ["--proliferation.times=4"]).get(Augmentation) == four_times


def test_views_that_the_loss_does_not_see(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text((ARMS / "vector_distillation.toml").read_text().replace('"context_distillation"', '"dpo"'))
    message = r"Arm 'mine' has \[views\] \['good'\], but its loss uses none of them \(it uses \[\]\)"
    with pytest.raises(ArmError, match=message):
        load_arm(str(file))
    arm = load_arm("vector_neutral_dpo", ["--loss={name='cross_entropy'}", "--trainer.max_steps=1"])
    made = make_trainer(
        training_of(arm, tiny(), tokenizer(), pairs(4), tmp_path), save_strategy="no", disable_tqdm=True
    )
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
        load_arm("vector_dp")
    broken = tmp_path / "broken.toml"
    broken.write_text("[data\n")
    with pytest.raises(ArmError, match="not valid TOML"):
        load_arm(broken)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.train", "100000"], "100000 rows requested"),
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
    train, held_out = load_splits(load_arm("vector_dpo", ["--data.train", "5", "--data.test", "3"]).data)
    texts, held_out_texts = (
        rows.map(lambda row: {c: row[c][0]["content"] for c in ("prompt", "chosen", "rejected")})
        for rows in (train, held_out)
    )
    texts.to_csv(tmp_path / "train.csv")
    held_out_texts.to_parquet(tmp_path / "test.parquet")
    words = [f"--data.name={tmp_path}", "--data.train=5", "--data.test=3"]
    read, test = load_splits(load_arm("vector_dpo", words).data)
    # texts with nothing between them are the turns that they were
    assert sorted(map(str, read["prompt"])) == sorted(map(str, train["prompt"]))
    assert test.to_list() == held_out.to_list()
