"""The command `steertune`, and its small subcommands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_data
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_data import saved_on_its_base
from tiny_models import steered, tiny

from steertune.adapters import set_strength
from steertune.recipes import chat, cli, info
from steertune.recipes.lab.generation import generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved adapter whose base, with a tokenizer, stands beside it."""
    return saved_on_its_base(tmp_path_factory.mktemp("cli"), max_position_embeddings=512)


def test_every_recipe_is_a_command_with_a_line_of_help(capsys):
    assert cli.main(["--help"]) == 0
    page = capsys.readouterr().out
    for name, line in cli.commands().items():
        assert line and f"\n  {name} " in page, name
    assert {"train", "ablate", "report", "export", "chat", "info", "gradients"} <= {*cli.commands()}
    assert not {"cli", "arm", "measures", "training"} & set(cli.commands())


@pytest.mark.parametrize("name", ["trl_dpo", "trl_sft", "dpo_loop"])
def test_help_of_recipes_that_read_their_words_themselves(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = "import sys; from steertune.recipes.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_unknown_commands_and_no_command(capsys):
    assert cli.main(["trian"]) == 2
    assert "No such command 'trian'. Did you mean 'train'?" in capsys.readouterr().err
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("steertune ")


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(info.main, "function", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["info", "x"]) == 130
    assert "continues where it stopped" in capsys.readouterr().err


def test_info_says_what_is_there_and_whether_it_fits(folder, capsys):
    assert cli.main(["info", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["switches"]["layers"] == [1, 2]
    assert found["made for"] == {"model_type": "llama", "hidden_size": 32, "num_layers": 4}
    assert len(found["lengths"]) == 2 and found["parameters"] == 64
    assert cli.main(["info", str(folder), "--model", str(folder.parent / "base")]) == 0
    page = capsys.readouterr().out
    assert "fits: " in page and "  peft: yes" in page and "  gguf: yes" in page


def test_info_refuses_what_is_no_vector_or_does_not_fit(folder, tmp_path, capsys):
    tiny(seed=4, max_position_embeddings=512).save_pretrained(tmp_path / "other")
    tiny_data.tokenizer().save_pretrained(tmp_path / "other")
    assert cli.main(["info", str(folder), "--model", str(tmp_path / "other")]) == 2
    assert "not the adapter's base model" in capsys.readouterr().err
    assert cli.main(["info", str(tmp_path)]) == 2
    get_peft_model(tiny(), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "lora")
    assert cli.main(["info", str(tmp_path / "lora")]) == 2
    assert "LORA" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    assert cli.main(["info", str(broken)]) == 2
    save_file({"model.layers.1.x": tiny().lm_head.weight}, broken / "adapter_model.safetensors")
    assert cli.main(["info", str(broken)]) == 2


def talk(model, *lines: str) -> list[str]:
    return list(chat.Chat(model, tiny_data.tokenizer(), 1.0, 4, 0.0).talk(lines))


def test_chat_is_generation_at_two_strengths_with_memory(folder):
    model = steered(tiny(max_position_embeddings=512), layers=2)
    said = talk(model, "the cat", "/strength -2", "a dog", "/alone", "the sky", "/reset", "the cat")
    assert [line.split(">")[0] for line in said] == [
        "base", "+1", "Strength -2.", "base", "-2", "Without the base model.", "-2", "Forgotten.", "-2"
    ]  # fmt: skip
    words = tiny_data.tokenizer()
    first = [{"role": "user", "content": "the cat"}]
    with set_strength(model, 0):
        [base] = generate(model, words, [first], 4)
        then = [*first, {"role": "assistant", "content": base}, {"role": "user", "content": "a dog"}]
        [second] = generate(model, words, [then], 4)
    shown = {"": "(an empty answer)"}
    assert said[0] == f"base> {shown.get(base, base)}" and said[3] == f"base> {shown.get(second, second)}"
    [once] = generate(model, words, [first], 4)
    assert said[1] == f"+1> {shown.get(once, once)}"
    with set_strength(model, -2):
        [again] = generate(model, words, [first], 4)
    assert said[-1] == f"-2> {again}", "nothing of the conversation before"


def test_chat_says_what_it_does_not_understand():
    model = steered(tiny(max_position_embeddings=512), layers=2)
    said = talk(model, "/strength much", "/strength nan", "/strength", "/what", "  ", "/quit", "the cat")
    assert said[:2] == ["'much' is not a number.", "'nan' is not finite."]
    assert said[2:] == [chat._HELP, chat._HELP]
    with pytest.raises(ValueError, match="strength must be finite"):
        chat.Chat(model, tiny_data.tokenizer(), float("nan"), 4, 0.0)


def test_chat_reads_a_pipe(folder, monkeypatch, capsys):
    typed = iter(["the cat", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert cli.main(["chat", str(folder), "--new-tokens", "3"]) == 0
    assert [line.split(">")[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["base", "+1"]
    assert cli.main(["chat", str(folder.parent)]) == 2
