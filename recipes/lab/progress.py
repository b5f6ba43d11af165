"""The progress of a command: one bar for all its work, with the time left and the current step.

    with progress("Training", total=10) as bar:
        with bar.step("train", 8):
            for batch in track(batches, "batch"):  # fills the step's share, wherever it is called
                ...
        with bar.step("neutral text", 2):
            ...

A `progress` inside a step of another fills that step's share, so that a cell that runs inside a grid moves the grid's
bar. `step` and `track` work anywhere, and do nothing if no bar is open. `aside` shows a name without moving the bar.
Without a terminal there is a line at the start, one every 30 seconds, and a line at the end.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TaskProgressColumn, TextColumn
from rich.text import Text

T = TypeVar("T")
EVERY = 30.0
"""Seconds between two lines without a terminal."""
_FIRST = 0.02  # share of the work that must be done before the time left is estimated


class Display:
    """All work of a command, of which bars fill parts; this class shows nothing.

    Attributes:
        at: Share that is done.
        steps: Names of the current steps, the innermost last.
        note: Text from the innermost step, such as its loss.
        spans: Where the share of each of these steps starts, and how wide it is.
    """

    def __init__(self) -> None:
        self.at, self.skipped = 0.0, 0.0
        self.steps: list[str] = []
        self.note = ""
        self.spans: list[tuple[float, float]] = [(0.0, 1.0)]
        self.started = time.monotonic()

    @property
    def step(self) -> str:
        """The current steps, as one text."""
        return ", ".join(filter(None, [*self.steps, self.note]))

    def left(self) -> str:
        """The time left, in words; empty if it is too early to tell. Work of an earlier run is not counted."""
        done = self.at - self.skipped
        if done < _FIRST * (1 - self.skipped):
            return ""
        return f"{duration((time.monotonic() - self.started) * (1 - self.at) / done)} left"

    def show(self) -> None:
        """Show the current state, after a change."""

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        print(text, file=sys.stderr, flush=True)

    def close(self, finished: bool = True) -> None:
        """End the display; `finished` is False after an error."""


class Lines(Display):
    """For a file or a pipe: a line now and then, also during a long step."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title, self.last = title, self.started
        self.say(f"{title}: started")
        self.ended = threading.Event()
        threading.Thread(target=self._show_again, daemon=True).start()

    def _show_again(self) -> None:
        while not self.ended.wait(EVERY):
            self.show()

    def show(self) -> None:
        if self.at < 1 and time.monotonic() - self.last >= EVERY:
            self.last = time.monotonic()
            self.say(", ".join(filter(None, [f"{self.title}: {self.at:.0%}", self.left(), self.step])))

    def close(self, finished: bool = True) -> None:
        self.ended.set()
        state = f"{self.at:.0%}" if finished else "stopped"
        self.say(f"{self.title}: {state} after {duration(time.monotonic() - self.started)}")


class Terminal(Display):
    """For a terminal: a bar."""

    def __init__(self, title: str) -> None:
        super().__init__()
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _State(self))
        # prints appear above the bar, but a redirected standard output is left alone
        self.progress = Progress(
            *columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()
        )
        self.task: TaskID = self.progress.add_task(title, total=1.0)
        self.progress.start()

    def show(self) -> None:
        self.progress.update(self.task, completed=self.at)

    def say(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False)

    def close(self, finished: bool = True) -> None:
        self.progress.stop()


class _State(ProgressColumn):
    """The time left and the current step."""

    def __init__(self, display: Display) -> None:
        super().__init__()
        self.display = display

    def render(self, task: object) -> Text:
        return Text(", ".join(filter(None, [self.display.left(), self.display.step])), overflow="ellipsis")


class Bar:
    """A part of the work, divided into `total` units."""

    def __init__(self, total: float) -> None:
        self.display = _display
        self.start, self.width = _display.spans[-1]
        self.total, self.done = max(total, 1e-9), 0.0

    @contextmanager
    def step(self, name: str, weight: float = 1.0) -> Iterator[None]:
        """A named step of `weight` units of this bar. Bars that are opened inside fill it."""
        self.display.steps.append(name)
        self.display.spans.append((self._at(self.done), self.width * weight / self.total))
        self.display.show()
        try:
            yield
        finally:
            self.display.steps.pop()
            self.display.spans.pop()
            self.advance(weight)

    def advance(self, weight: float = 1.0) -> None:
        """Add units that are done."""
        self.done += weight
        self.display.at = max(self.display.at, self._at(self.done))
        self.display.show()

    def skip(self, weight: float = 1.0) -> None:
        """Add units that were done before this command started."""
        self.display.skipped += self.width * weight / self.total
        self.advance(weight)

    def note(self, text: str) -> None:
        """Show a text beside the name of the step, until another one takes its place."""
        self.display.note = text
        self.display.show()

    def say(self, text: str) -> None:
        """Print a line on standard error."""
        self.display.say(text)

    def _at(self, done: float) -> float:
        return self.start + self.width * min(done / self.total, 1.0)


_SILENT = Display()
_display = _SILENT


@contextmanager
def progress(title: str, total: float = 1.0, show: bool = True) -> Iterator[Bar]:
    """A bar of `total` units: that of the command or, inside a step of another bar, that of the step. Steps are
    weighted by their units, from which the time left is estimated."""
    global _display
    if _display is not _SILENT or not show or os.environ.get("RANK", "0") != "0":
        yield Bar(total)
        return
    _display = Terminal(title) if sys.stderr.isatty() else Lines(title)
    finished = False
    try:
        yield Bar(total)
        finished = True
    finally:
        _display.close(finished)
        _display = _SILENT


@contextmanager
def step(name: str) -> Iterator[None]:
    """Name the current work, which fills the whole of its enclosing step."""
    with Bar(1.0).step(name):
        yield


@contextmanager
def aside(name: str) -> Iterator[None]:
    """Name work that does not count: bars that are opened inside do not move the total."""
    with Bar(1.0).step(name, 0.0):
        yield


def track(items: Sequence[T], name: str = "") -> Iterator[T]:
    """Iterate over items; each fills an equal part of the current step."""
    bar = Bar(len(items))
    for i, item in enumerate(items):
        with bar.step(f"{name} {i + 1} of {len(items)}".strip()):
            yield item


def say(text: str) -> None:
    """Print a line on standard error, above the bar if there is one."""
    _display.say(text)


def duration(seconds: float) -> str:
    """Seconds in words, with the precision of an estimate."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
