"""Good things for the tables of bad inputs to spoil."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_grids import make_tables
from tiny_models import steered

Row = tuple[Callable[["Lab"], Any], str]
"""What is called, and a regular expression that the error must match."""


@dataclass
class Lab:
    """Folders of good files; `here` is the test's own."""

    root: Path
    here: Path = field(default_factory=Path)
    made: dict[str, Any] = field(default_factory=dict)

    def adapter(self) -> Path:
        """A copy of a good adapter."""
        return shutil.copytree(self.root / "adapter", self.here / "adapter", dirs_exist_ok=True)

    def tables(self) -> dict[str, Any]:
        """The tables of a good grid."""
        return json.loads((self.root / "tables.json").read_text())

    def file(self, name: str, text: str | bytes) -> Path:
        """A file of the test's."""
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path


def make_lab(root: Path) -> Lab:
    """Write the good files."""
    steered().save_pretrained(root / "adapter")
    tables = make_tables(root)
    (root / "tables.json").write_text(json.dumps(tables))
    return Lab(root)


class Refused(ValueError):
    """What a command line said when it ended with code 2."""


def run(main: Callable[[Sequence[str]], int], words: Sequence[str]) -> None:
    """A recipe in this process; what it says of wrong input as an error."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(words)
        except SystemExit as end:  # argparse
            code = end.code
    if code == 2:
        text = said.getvalue()
        assert "Traceback" not in text
        for name in ("UnicodeDecodeError", "JSONDecodeError", "KeyError", "IndexError", "AttributeError"):
            assert not text.startswith(name), text
        raise Refused(text)
    raise AssertionError(f"{words} ended with {code}")
