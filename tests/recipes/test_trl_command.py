"""TRL's command line with our trainers: what is trained is what the same call in Python trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_data
import torch
import yaml
from peft import PeftModel
from tiny_models import tiny, vector_of

from steertune.adapters import SteeringVectorConfig
from steertune.losses.bipo import BiPO
from steertune.recipes import cli
from steertune.recipes.lab.sources import load_parts
from steertune.recipes.lab.trained_on import read
from steertune.recipes.lab.trl_command import SteeringArguments


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base with a tokenizer, pairs and demonstrations."""
    home = tmp_path_factory.mktemp("trl")
    tiny_data.save_model(home / "base")
    for name, rows in (("pairs", tiny_data.pairs), ("demonstrations", tiny_data.demonstrations)):
        tiny_data.save_task(home / name, train=rows(), test=rows(4, seed=1))
    return home


STEPS = (
    "--max_steps 2 --per_device_train_batch_size 4 --learning_rate 0.05 --report_to none --save_strategy no "
    "--gradient_checkpointing False --disable_tqdm True --dataloader_pin_memory False"
).split()


def run(command: str, home: Path, out: Path, *words: str) -> int:
    data = "pairs" if command == "trl_dpo" else "demonstrations"
    named = ["--model_name_or_path", str(home / "base"), "--dataset_name", str(home / data), "--output_dir", str(out)]
    return cli.main([command, *named, *STEPS, *words])


def test_dpo_trains_what_the_same_call_trains(home, tmp_path):
    switches = ["--steering_layers", "[1, 0.5]", "--steering_norm", "capped", "--steering_norm_value", "3"]
    loss = ["--loss", "bipo", "--loss_options", "{beta = 0.3}"]
    assert (
        run("trl_dpo", home, tmp_path / "out", *switches, *loss, "--eval_strategy", "steps", "--eval_steps", "2") == 0
    )
    found = PeftModel.from_pretrained(tiny(), tmp_path / "out")
    config = SteeringVectorConfig(layers=[1, 0.5], norm="capped", norm_value=3)
    same = tiny_data.trained("dpo", tmp_path / "same", peft_config=config, loss=BiPO(beta=0.3), max_steps=2)
    assert found.peft_config["default"].layers == [1, 2]
    assert vector_of(found).any() and torch.allclose(vector_of(found), vector_of(same.model), atol=1e-6)


def test_sft_reads_a_yaml_file_and_the_command_line_wins(home, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump({"steering_layers": "1", "steering_tied": True, "learning_rate": 0.5}))
    assert run("trl_sft", home, tmp_path / "out", "--config", str(file), "--steering_form", "gated") == 0
    found = PeftModel.from_pretrained(tiny(), tmp_path / "out")
    config = found.peft_config["default"]
    assert (config.layers, config.form, config.tied) == ([1], "gated", True)
    same = tiny_data.trained(
        "sft", tmp_path / "same", peft_config=SteeringVectorConfig(layers=1, form="gated", tied=True), max_steps=2
    )
    assert torch.allclose(vector_of(found), vector_of(same.model), atol=1e-6)


def test_lora_by_trls_own_flags(home, tmp_path):
    assert run("trl_dpo", home, tmp_path / "out", "--use_peft", "--lora_r", "2", "--loss", "simpo") == 0
    config = PeftModel.from_pretrained(tiny(), tmp_path / "out").peft_config["default"]
    assert config.peft_type == "LORA" and config.r == 2


@pytest.mark.parametrize("command", ["trl_dpo", "trl_sft"])
def test_one_file_is_divided_where_the_trainer_evaluates(home, tmp_path, command, capsys):
    evaluated = ["--dataset_name", str(tmp_path / "one.jsonl"), "--eval_strategy", "steps", "--eval_steps", "2"]
    rows = (tiny_data.pairs if command == "trl_dpo" else tiny_data.demonstrations)(50)
    rows.to_json(tmp_path / "one.jsonl")
    assert run(command, home, tmp_path / "out", *evaluated) == 0
    assert "is one file of 50 rows, divided by a hash of the prompt" in capsys.readouterr().out
    parts = load_parts(str(tmp_path / "one.jsonl"))
    [trained] = read(tmp_path / "out") or []
    assert len(trained.hashes) == len({*parts.train["prompt"]}) and not trained.resembling(parts.test.to_list())

    rows.select(range(8)).to_json(tmp_path / "one.jsonl")
    assert run(command, home, tmp_path / "few", *evaluated) == 2
    assert "too few to hold any out" in capsys.readouterr().err
    same = ["--dataset_name", str(home / "pairs"), "--dataset_test_split", "train", "--eval_strategy", "steps"]
    assert run(command, home, tmp_path / "same", *same) == 2
    assert not (tmp_path / "few").exists() and not (tmp_path / "same").exists()


def test_every_switch_can_be_said():
    """A new field of the configuration needs a flag, or an entry here."""
    inner = {"residual_norms", "stream_sizes", "base_fingerprint", "checksum", "target_modules", "modules_to_save"}
    own = set(SteeringVectorConfig.__annotations__) - inner
    flags = {name.removeprefix("steering_") for name in SteeringArguments.__dataclass_fields__ if "steering_" in name}
    assert flags == own
    arguments = SteeringArguments()
    assert arguments.peft_config().to_dict() == SteeringVectorConfig(layers=0.667).to_dict()
    assert arguments.loss_object() is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steering_form", "biass"], "Did you mean 'bias'"),
        (["--loss", "bippo"], "Did you mean 'bipo'"),
        (["--loss_options", "{beta = 1}"], "Unknown key 'beta'"),
        (["--loss", "bipo", "--loss_options", "beta"], "must be a table"),
        (["--dataset_train_split", "trane"], "no split 'trane'"),
        (["--steering_norm", "fixed"], "needs a finite norm_value"),
    ],
)
def test_bad_words_are_refused_before_anything_runs(home, tmp_path, words, message, capsys):
    assert run("trl_dpo", home, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_model_and_data(tmp_path, capsys):
    assert cli.main(["trl_sft", "--output_dir", str(tmp_path / "out")]) == 2
    assert "give --dataset_name" in capsys.readouterr().err
    words = ["--dataset_name", "cautious_advice", "--output_dir", str(tmp_path / "out")]
    assert cli.main(["trl_dpo", *words]) == 2
    assert "give --model_name_or_path" in capsys.readouterr().err
