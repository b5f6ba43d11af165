"""The progress of a command: one total, whatever is nested in it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from steertune.recipes.lab import progress as module
from steertune.recipes.lab.progress import Bar, Display, aside, duration, progress, say, step, track


def at() -> float:
    return round(module._display.at, 6)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Seconds that have passed."""
    passed = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: passed[0])
    return passed


def cell(seconds: list[float] | None = None) -> list[float]:
    """Half training in four steps, half evaluation."""
    reached = []
    with progress("Cell", 2) as bar:
        with bar.step("training"):
            for _ in track(range(4), "batch"):
                if seconds is not None:
                    seconds[0] += 10.0
                reached.append(at())
        with bar.step("evaluation"), step("neutral text"):
            reached.append(at())
    return reached


def test_what_is_nested_moves_the_same_total():
    with progress("Cells", 2) as bar:
        with bar.step("first"):
            assert cell() == [0.0, 0.0625, 0.125, 0.1875, 0.25]
        assert at() == 0.5
        with bar.step("second"):
            assert cell() == [0.5, 0.5625, 0.625, 0.6875, 0.75]
        assert at() == 1.0
    assert module._display is module._SILENT


def test_a_bar_never_goes_back_nor_beyond_its_step():
    with progress("Cells", 2) as bar, bar.step("first"):
        Bar(1).advance(5)
        assert at() == 0.5
        Bar(4).advance()
        assert at() == 0.5


def test_without_a_bar_nothing_is_shown(capsys):
    with step("alone"):
        assert [*track([1, 2, 3], "item")] == [1, 2, 3]
        Bar(3).note("loss 1")
    with progress("Hidden", show=False) as bar, bar.step("one"):
        pass
    captured = capsys.readouterr()
    assert not captured.out and not captured.err


def test_without_a_terminal_there_is_a_line_every_thirty_seconds(clock, capsys):
    with progress("Cells", 10) as bar:
        for i in range(10):
            with bar.step(f"cell {i}"):
                cell(clock)  # 40 seconds in 4 batches
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Cells: started" and lines[-1] == "Cells: 100% after 7 min"
    assert len(lines) <= 2 + 400 / 30
    assert lines[1] == "Cells: 2%, cell 0, training, batch 3 of 4" or "min left, cell 0, training" in lines[1]


def test_a_long_step_shows_that_it_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(module, "EVERY", 0.02)
    with progress("Working") as bar, bar.step("one long step"):
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert lines.count("Working: 0%, one long step") >= 3
    monkeypatch.setattr(module, "EVERY", 0.0)
    time.sleep(0.05)
    assert capsys.readouterr().err == "", "it says nothing after the end"


def test_what_is_done_aside_is_named_and_does_not_move_the_total():
    with progress("Working", total=2) as bar:
        with aside("a rehearsal"):
            for _ in track("abc", "row"):
                assert bar.display.at == 0 and "a rehearsal, row" in bar.display.step
        with bar.step("work", 1):
            pass
        assert bar.display.at == 0.5


def test_an_error_is_not_reported_as_finished_work(capsys):
    with pytest.raises(ValueError, match="wrong"), progress("Cells") as bar, bar.step("cell"):
        raise ValueError("wrong")
    assert capsys.readouterr().err.splitlines()[-1] == "Cells: stopped after 0 s"


def test_the_time_left_does_not_count_what_an_earlier_run_did(clock):
    with progress("Cells", 10) as bar:
        bar.skip(8)
        assert module._display.left() == ""
        clock[0] += 60.0
        bar.advance()
        assert module._display.left() == "60 s left"


def test_an_error_inside_leaves_no_bar_behind():
    with pytest.raises(ValueError), progress("Cells", 2) as bar, bar.step("first"):
        raise ValueError
    assert module._display is module._SILENT
    assert (module._SILENT.steps, len(module._SILENT.spans)) == ([], 1)


def test_only_the_first_process_shows_a_bar(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with progress("Cells"):
        pass
    assert not capsys.readouterr().err


def test_the_steps_and_the_note_are_named(capsys):
    with progress("Training") as bar, bar.step("train"), step("batch"):
        bar.note("loss 0.5")
        assert module._display.step == "train, batch, loss 0.5"
        say("a line")
    assert "a line\n" in capsys.readouterr().err


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    shown: list[Any] = []
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(module.Terminal, "show", lambda self: shown.append(self.at))
    with progress("Cells", 2) as bar:
        assert isinstance(module._display, module.Terminal)
        bar.advance()
        bar.say("one failed")
    assert shown == [0.5]
    assert "one failed" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(3, "3 s"), (89, "89 s"), (120, "2 min"), (7200, "2.0 h")])
def test_durations_are_as_exact_as_estimates(seconds, text):
    assert duration(seconds) == text


def test_a_display_without_work_has_no_time_left():
    assert Display().left() == ""
