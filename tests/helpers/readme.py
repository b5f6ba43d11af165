"""What README.md describes: a new file of your own needs no row there, so tests of what ships read its tables."""

from __future__ import annotations

import re

from paths import ROOT


def rows(heading: str) -> set[str]:
    """The names in the first column of the table whose header starts with `heading`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition(f"\n| {heading} ")[2].partition("\n\n")[0]
    return set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
