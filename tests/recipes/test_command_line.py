"""The command line of every recipe: help, keys of an arm, hints, completion, results, exit codes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import peft
import pytest
import trl
from tiny_data import saved_on_its_base

import steertune.losses
from steertune.adapters.config import SteeringVectorConfig
from steertune.recipes import cli
from steertune.recipes.lab import arm, ingredients
from steertune.recipes.lab.command_line import Command, Group, Result, command
from steertune.recipes.lab.fields import FieldText, documented, fields_of
from steertune.recipes.lab.files import ArmError
from steertune.recipes.lab.keys import USUAL, arm_keys, meant, split_overrides
from steertune.recipes.lab.options import ArmName, Choice, Count, Option, Threads
from steertune.recipes.lab.parsing import spread
from steertune.recipes.lab.paths import without_paths
from steertune.recipes.lab.tables import ArmTables

SIZES = [0.1, 0.5]
FLAT = {"dpo_loop", "trl_dpo", "trl_sft"}
"""Recipes that read their words themselves."""
COMMANDS = [name for name in cli.commands() if name not in FLAT]


@command
def demo(
    arm: ArmName = "vector_dpo",
    sizes: Annotated[list[float], Option(help="several")] = SIZES,
    kind: Annotated[str, Choice(["bias", "gated"], "one of two")] = "bias",
    count: Annotated[int, Count("how many")] = 3,
    threads: Threads = None,
    overrides: Sequence[str] = (),
    words: Sequence[str] = (),
) -> Result:
    """Say what was understood."""
    print("on the way")
    if kind == "gated":
        raise ArmError("gated is wrong here")
    data = {"arm": arm, "sizes": sizes, "count": count, "threads": threads, "overrides": [*overrides]}
    return Result({**data, "words": [*words]}, f"count {count}", code=1 if count == 7 else 0)


def understood(capsys: Any, *words: str) -> dict[str, Any]:
    assert demo([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def run(*words: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """`steertune` in a process of its own, and its CPU seconds."""
    code = "import sys; from steertune.recipes.cli import main; sys.exit(main())"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env={**os.environ, **environment}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# -- help ------------------------------------------------------------


def test_help_of_train_lists_every_key_within_two_cpu_seconds():
    done, seconds = run("train", "--help", COLUMNS="200")
    assert done.returncode == 0 and seconds < 2
    assert done.stdout.startswith("Usage: steertune train ")
    for key in arm_keys().values():
        assert f"  --{key.name} {key.type}" in done.stdout, key


def test_no_help_imports_torch():
    code = f"""
import contextlib, io, sys
from steertune.recipes.cli import main
for name in {COMMANDS!r}:
    with contextlib.redirect_stdout(io.StringIO()) as page:
        assert main([name, "--help"]) == 0
    assert page.getvalue().startswith(f"Usage: steertune {{name}} "), name
    assert not {{"torch", "trl", "transformers", "datasets"}} & {{*sys.modules}}, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_read_of_a_file_is_what_the_imported_recipe_has(name):
    outlined: Any = cli.load(name)
    imported = importlib.import_module(cli.find(name)[1]).main
    assert isinstance(imported, Command | Group)
    for made, real in _commands(outlined.build(), imported.build()):
        assert [(p.name, p.opts, p.required, p.default) for p in made.params] == [
            (p.name, p.opts, p.required, p.default) for p in real.params
        ]
        assert made.help == real.help


def _commands(made: Any, real: Any) -> list[tuple[Any, Any]]:
    inside = getattr(made, "commands", {})
    return [(inside[name], real.commands[name]) for name in inside] or [(made, real)]


def test_every_key_of_an_arm_is_listed_with_text_and_type():
    keys = arm_keys()
    for name, key in keys.items():
        assert key.text and key.type, name
    listed = {name.partition(".")[0] for name in keys}
    assert listed == {*ArmTables.model_fields, *ingredients.kinds()}
    for table in ("model", "data", "evaluation", "output", "card"):
        fields = ArmTables.model_fields[table].annotation.model_fields  # pyright: ignore
        assert {f"{table}.{key}" for key in fields} == {name for name in keys if name.startswith(f"{table}.")}
    of_loss = {name.removeprefix("loss.") for name in keys if name.startswith("loss.")}
    for loss in steertune.losses.names():
        options = {field.name for field in dataclasses.fields(steertune.losses.get_loss(loss))}  # pyright: ignore
        assert options <= of_loss, loss
    assert keys["loss.beta"].default == "0.1 (bipo, dpo, ipo); 2.0 (simpo)"
    assert keys["adapter.form"].type == "bias | span | gated | linear | low_rank | project"


@pytest.mark.parametrize("kind", [trl.DPOConfig, trl.SFTConfig, peft.LoraConfig, SteeringVectorConfig])
def test_fields_read_from_the_file_are_those_of_the_class(kind):
    """An upstream change that the reading does not understand is noticed here."""
    fields = fields_of(kind.__module__, kind.__name__)
    real = {field.name: field for field in dataclasses.fields(kind)}
    assert list(fields) == list(real)
    for name, field in real.items():
        text = " ".join(field.metadata.get("help", "").replace("%%", "%").split())
        assert fields[name].text == text or not text, name
        assert _default(field) in (fields[name].default, None) or not _is_written(fields[name]), name


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return repr(field.default_factory()) if field.default_factory is not dataclasses.MISSING else None


def _is_written(field: FieldText) -> bool:
    """Whether a default stands in the file as `repr` writes it: no name, no sum, no number such as 5e-5."""
    try:
        return field.default is not None and repr(eval(field.default, {})) == field.default
    except NameError:
        return False


def test_documented_reads_what_a_docstring_says_of_arguments():
    text = """A thing.

    Args:
        first: One
            and more.
        second (int): Two: three.

    Raises:
        X: y.
    """
    assert documented(text) == {"first": "One and more.", "second": "Two: three."}
    assert documented(None) == {}


# -- words ------------------------------------------------------------


def test_overrides_stand_anywhere_and_are_read_as_in_toml(capsys):
    data = understood(capsys, "--trainer.max_steps", "3", "--loss={name='ipo'}", "lora_dpo", "--data.name=x.jsonl")
    assert data["arm"] == "lora_dpo"
    assert data["overrides"] == ["--trainer.max_steps", "3", "--loss={name='ipo'}", "--data.name=x.jsonl"]
    tables = dict(arm._pairs(data["overrides"]))
    assert tables == {"trainer.max_steps": 3, "loss": {"name": "ipo"}, "data.name": "x.jsonl"}


def test_several_values_and_the_words_as_typed(capsys):
    typed = ["lora_dpo", "--sizes", "1", "-2", "0.5", "--count", "4"]
    data = understood(capsys, *typed)
    assert (data["sizes"], data["count"], data["words"]) == ([1, -2, 0.5], 4, [*typed, "--json"])
    assert understood(capsys, "--sizes=1", "--sizes", "2")["sizes"] == [1, 2]
    assert spread(["--a", "1", "-2", "-b", "x"], {"--a"}) == ["--a", "1", "--a", "-2", "-b", "x"]


def test_an_option_of_the_command_goes_before_a_table_of_the_same_name():
    assert split_overrides(["--adapter.r", "1", "--json", "--data.seed=2"], {"--json"}) == (
        ["--json"],
        ["--adapter.r", "1", "--data.seed=2"],
    )
    assert split_overrides(["--train", "3", "--model=x", "--model.name", "y"], {"--train", "--model"}) == (
        ["--train", "3", "--model=x"],
        ["--model.name", "y"],
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lr", "1"], "No such option: --lr. Did you mean --trainer.learning_rate?"),
        (["--epochs=3"], "Did you mean --trainer.num_train_epochs?"),
        (["--batch-size", "3"], "Did you mean --trainer.per_device_train_batch_size?"),
        (["--output", "x"], "Did you mean --output.folder?"),
        (["--model", "x"], "Did you mean --model.name?"),
        (["--data", "x"], "Did you mean --data.name?"),
        (["--layer", "3"], "Did you mean --adapter.layers?"),
        (["--steps", "3"], "Did you mean --trainer.max_steps?"),
        (["--seed", "3"], "Did you mean --data.seed?"),
        (["--learning_rate", "3"], "Did you mean --trainer.learning_rate?"),
        (["--thread", "3"], "Did you mean --threads?"),
        (["--trainr.max_steps", "3"], "Did you mean --trainer.max_steps?"),
        (["--trainer.max_stepz", "3"], "Unknown key 'max_stepz' in [trainer]. Did you mean --trainer.max_steps?"),
        (["--loss.bata=1"], "Unknown key 'bata' in [loss]. Did you mean --loss.beta?"),
        (["--zzzzz"], "No such option: --zzzzz. --help lists them."),
        (["--count", "0"], "'0' must be a whole number of 1 or more"),
        (["--count", "\u0662"], "must be a whole number of 1 or more"),
        (["--count"], "requires an argument"),
        (["--sizes"], "requires an argument"),
        (["--sizes", "x"], "--sizes"),
        (["--kind", "gatid"], "'gatid' must be one of bias, gated. Did you mean 'gated'?"),
        (["a", "b"], "unexpected extra argument"),
    ],
)
def test_wrong_words_are_answered_on_one_line(words, says, capsys):
    assert demo(words) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert captured.err.startswith("steertune ")


def test_hints_name_keys_that_exist():
    assert {*USUAL.values()} <= {*arm_keys()}
    assert meant("nothing-like-it-at-all") is None


# -- results and exit codes ------------------------------------------------------------


def test_the_result_is_alone_on_standard_output_as_json(capsys):
    assert demo(["--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["count"] == 3 and captured.err == "on the way\n"
    assert demo([]) == 0
    assert capsys.readouterr().out == "on the way\ncount 3\n"


def test_exit_codes(capsys):
    assert demo(["--count", "7"]) == 1
    assert demo(["--kind", "gated"]) == 2
    assert capsys.readouterr().err.endswith("ArmError: gated is wrong here\n")
    assert Command(_interrupted)([]) == 130
    assert "continues where it stopped" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):
        Command(_broken)([])


def _interrupted() -> None:
    raise KeyboardInterrupt


def _broken() -> None:
    raise RuntimeError("a bug")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved_on_its_base(tmp_path_factory.mktemp("line"), max_position_embeddings=512)


@pytest.mark.parametrize(
    "words",
    [
        ["config"],
        ["config", "zero2"],
        ["scale"],
        ["info", "{adapter}"],
        ["vectors", "similarity", "{adapter}", "{adapter}"],
        ["vectors", "add", "{adapter}", "--output", "{new}/sum"],
        ["export", "{adapter}", "--to", "safetensors", "--output", "{new}/export"],
    ],
)
def test_json_of_every_quick_command_is_all_of_standard_output(words, folder, tmp_path, capfd, verified_here):
    given = [word.format(adapter=folder, new=tmp_path) for word in words]
    assert cli.main([*given, "--json"]) == 0
    json.loads(capfd.readouterr().out)


def test_every_command_that_has_a_result_has_json_and_every_one_that_runs_a_model_has_threads():
    without_result, without_model = {"chat", "serve"}, {"config", "report", "scale"}
    recipes = {name: cli.load(name) for name in COMMANDS}
    for name, recipe in recipes.items():
        if isinstance(recipe, Group):
            continue
        assert isinstance(recipe, Command)
        options = {option for parameter in recipe.build().params for option in parameter.opts}
        assert ("--json" in options) == (name not in without_result), name
        assert ("--threads" in options) == (name not in without_model), name


# -- completion ------------------------------------------------------------


def complete(*words: str) -> list[str]:
    done, _ = run(
        _STEERTUNE_COMPLETE="complete_bash", COMP_WORDS=" ".join(["steertune", *words]), COMP_CWORD=str(len(words))
    )
    return done.stdout.split()


def test_completion_of_commands_options_and_names():
    assert complete("abl") == ["ablate"]
    assert complete("train", "--trainer.max_st") == ["--trainer.max_steps"]
    assert complete("train", "vector_d") == ["vector_demonstrations_distillation", "vector_distillation", "vector_dpo"]
    assert complete("export", "x", "--to", "pe") == ["peft"]
    assert complete("vectors", "sim") == ["similarity"]


def test_completion_can_be_installed():
    assert "--install-completion" in run("--help")[0].stdout
    done, _ = run(_STEERTUNE_COMPLETE="source_bash")
    assert "complete -o default -F _steertune_completion steertune" in done.stdout


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("quick --folder /a/b --threads 2", "quick --folder FOLDER --threads 2"),
        ("quick --folder=runs/x --data-root=/data", "quick --folder=FOLDER --data-root=DATA-ROOT"),
        ("/home/me/mine.toml --reuse /a --known /b", "mine.toml --reuse REUSE --known KNOWN"),
        ("--adapter=/home/me/vector --strengths 1 2", "--adapter=vector --strengths 1 2"),
    ],
)
def test_a_command_line_is_kept_without_the_paths_of_a_machine(words, shown):
    assert without_paths(words.split()) == shown.split()
