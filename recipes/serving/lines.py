"""Lines of a file or a pipe, as they arrive."""

from __future__ import annotations

import codecs
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steertune.recipes.lab.progress import Bar

LONGEST_LINE = 2**20  # bytes


class Lines:
    """Lines of a file or pipe as bytes, of limited length; lines that arrived together are returned together.

    Args:
        source: A file descriptor.
        bar: Advanced by every byte that is read.
        longest: Maximum length of a line in bytes; the rest of a longer one is discarded.
    """

    def __init__(self, source: int, bar: Bar, longest: int = LONGEST_LINE) -> None:
        self.source, self.bar, self.longest = source, bar, longest
        self.number = 0
        self._buffer, self._ended, self._cut = b"", False, False

    def parts(self, size: int) -> Iterator[list[tuple[int, bytes | None]]]:
        """Numbers and contents of lines that are not blank, `size` at a time, or fewer if no more have arrived; the
        content of a line that is too long is None."""
        while not self._ended or self._buffer:
            part: list[tuple[int, bytes | None]] = []
            while len(part) < size and (line := self._next(wait=not part)) is not None:
                too_long, content = line
                if too_long or content.strip():
                    part.append((self.number, None if too_long else content))
                self.number += 1
            if part:
                yield part

    def _next(self, wait: bool) -> tuple[bool, bytes] | None:
        """Whether the next line is too long, and its content; None if it has not arrived yet, or at the end."""
        while b"\n" not in self._buffer and not self._ended:
            if not wait and not _is_ready(self.source):
                return None
            self._read()
        if not self._buffer:
            return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        too_long, self._cut = self._cut or len(line) > self.longest, False
        return too_long, line.removeprefix(codecs.BOM_UTF8) if self.number == 0 else line

    def _read(self) -> None:
        chunk = os.read(self.source, 2**16)
        self._ended = not chunk
        self.bar.advance(len(chunk))
        self._buffer += chunk
        if b"\n" not in self._buffer and len(self._buffer) > self.longest:
            self._buffer, self._cut = b"x", True  # a placeholder for the line until its end arrives


def _is_ready(source: int) -> bool:
    """Whether reading would return at once. Unknown for pipes on Windows, where reading waits for whole batches."""
    try:
        return bool(select.select([source], [], [], 0)[0])
    except OSError:
        return True


@contextmanager
def opened(file: Path) -> Iterator[int]:
    """Open a file for reading, and give its descriptor."""
    with file.open("rb") as source:
        yield source.fileno()
