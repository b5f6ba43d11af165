"""Lists in the documentation are read from folders."""

from __future__ import annotations

import re

from paths import ROOT, module_at

from steertune import losses
from steertune.adapters import directions
from steertune.recipes import cli
from steertune.recipes.lab.arm_files import ARMS

sources = module_at(ROOT / "docs" / "sources.py")


def names(kind: str) -> set[str]:
    """The names in a list."""
    return {*re.findall(r"^\| `(\w+)` \| \S", sources.on_page_markdown(f"<!-- list: {kind} -->"), re.MULTILINE)}


def test_lists_have_everything_with_a_line_about_it() -> None:
    assert names("commands") == {*cli.commands()}
    assert names("arms") == {file.stem for file in ARMS.glob("*.toml")}
    assert names("grids") == {file.stem for file in (ARMS.parent / "grids").glob("*.toml")}
    assert names("losses") == {*losses.names()}
    assert names("directions") == {*directions.names()}


def test_every_list_of_the_pages_exists() -> None:
    pages = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "docs" / "pages").rglob("*.md"))
    asked = re.findall(r"<!-- list: (\w+) -->", pages)
    assert asked and {*asked} <= {*sources.LISTS, *sources.TABLES}
