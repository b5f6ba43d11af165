"""What no input is to blame for: Ctrl-C, a reader that goes away, a full disk, a lock that nobody holds."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_data import saved_on_its_base

from steertune.recipes import cli
from steertune.recipes.lab import processes
from steertune.recipes.lab.command_line import CLOSED, INTERRUPTED, outcome
from steertune.recipes.lab.secrets import masked
from steertune.trainers import NonFiniteError

TOKEN = "hf_" + "a1B2" * 9


@pytest.mark.parametrize("started", [[sys.executable, "-m", "steertune.recipes.chat"], ["steertune", "chat"]])
def test_an_interrupt_is_one_line_and_130(started, tmp_path):
    """While imports take their seconds, when nothing of the recipe runs yet; here one of them is interrupted."""
    slow = tmp_path / "peft" / "__init__.py"
    slow.parent.mkdir()
    slow.write_text(
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it\n"
        "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_module('steertune.recipes.cli', run_name='__main__')"
    words = [sys.executable, "-c", code, *started] if started[0] == "steertune" else started
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [*words, "nowhere"], capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": path}
    )
    assert "Traceback" not in process.stderr and "nterrupted" in process.stderr, process.stderr
    assert process.returncode == INTERRUPTED


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/page.md")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), "Is the disk full"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"), "Is the disk full"),
        (type("SafetensorError", (Exception,), {})("I/O error: No space left on device (os error 28)"), "disk full"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), "Use fewer rows"),
        (NonFiniteError("logits are NaN"), "NonFiniteError: logits are NaN"),
        (OSError(f"401 for https://me:{TOKEN}@host"), "https://<secret>@host"),
    ],
)
def test_what_the_user_can_mend_is_one_line(error, says, capsys):
    def fails() -> None:
        raise error

    assert outcome(fails) == 2
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 1 and TOKEN not in said


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shape"):
        outcome(lambda: (_ for _ in ()).throw(RuntimeError("shape mismatch")))


def test_an_interrupt_inside_says_that_nothing_is_lost(capsys):
    def stops() -> None:
        raise KeyboardInterrupt

    assert outcome(stops) == INTERRUPTED
    assert "continues where it stopped" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error():
    """As in `steertune ... | head -0`."""
    code = f"""
import sys
from steertune.recipes.lab.command_line import outcome
def says():
    for _ in range(100_000): print("line")
    sys.stdout.flush()
code = outcome(says)
sys.exit(0 if code == {CLOSED} else 1)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


def test_a_full_disk_ends_info_and_chat_with_a_line(tmp_path, monkeypatch, capsys):
    folder = saved_on_its_base(tmp_path)
    monkeypatch.setattr("steertune.recipes.info.describe", full)
    assert cli.main(["info", str(folder)]) == 2
    assert "No space left on device: 'runs/x/page.md' Is the disk full?" in capsys.readouterr().err


def test_a_lock_of_a_dead_build_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    processes.say_build_locks()
    assert capsys.readouterr().err == ""
    lock.parent.mkdir(parents=True)
    lock.touch()
    processes.say_build_locks()
    assert f"{lock} exists: another process builds" in capsys.readouterr().err


def test_secrets_of_the_environment_are_masked(monkeypatch):
    monkeypatch.setenv("MY_JUDGE_KEY", "correct-horse-battery")
    monkeypatch.setenv("SHORT_KEY", "a")
    assert masked("key correct-horse-battery, a word") == "key <secret>, a word"
    assert masked(f"at {Path('x')} {TOKEN}") == "at x <secret>"
