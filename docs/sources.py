"""What mkdocs runs: where the code is, and lists that are read from folders.

mkdocstrings reads files, and does not follow editable installs of namespace packages; so it gets links to the folders.
`<!-- list: arms -->` in a page becomes a table of the files in that folder, so that no list is kept by hand. The
tables `versions` and `architectures` are read from `setup.py` and from what the tests compare with.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LISTS = {
    "commands": ("recipes/*.py", "recipes/studies/*.py"),
    "arms": ("recipes/configs/arms/*.toml",),
    "grids": ("recipes/configs/grids/*.toml",),
    "losses": ("losses/*.py",),
    "directions": ("adapters/directions/*.py",),
}
"""Name of a list -> its files."""


def on_startup(**kwargs: Any) -> None:
    """Make `typings/steertune/`, which pyright looks at too: a link to each folder of the package."""
    home = ROOT / "typings" / "steertune"
    home.mkdir(parents=True, exist_ok=True)
    for folder in ("adapters", "losses", "trainers", "recipes"):
        link = home / folder
        if not link.is_symlink():
            link.symlink_to(Path("../..") / folder, target_is_directory=True)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replace every `<!-- list: NAME -->` with its table."""

    def made(match: re.Match[str]) -> str:
        return TABLES[match[1]]() if match[1] in TABLES else table(LISTS[match[1]])

    return re.sub(r"<!-- list: (\w+) -->", made, markdown)


def table(patterns: Sequence[str]) -> str:
    """Names of files, and the first sentence or line of what they say about themselves."""
    files = sorted((file for pattern in patterns for file in ROOT.glob(pattern)), key=lambda file: file.stem)
    rows = [(file.stem, about(file)) for file in files if not file.stem.startswith("_")]
    return "\n".join(["| | |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in rows if text)])


def about(file: Path) -> str:
    """The comment at the top of a TOML file, or the first line of a module's docstring.

    Empty for modules of recipes/ that define no `main`, because they are not commands.
    """
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".toml":
        comment = re.match(r"(?:#.*\n)*", text)
        return " ".join(line.lstrip("# ") for line in comment[0].splitlines()) if comment else ""
    module = ast.parse(text)
    # `def main(...)`, or `main = group(...)` in a file with subcommands
    functions = [node.name for node in module.body if isinstance(node, ast.FunctionDef)]
    values = [ast.unparse(target) for node in module.body if isinstance(node, ast.Assign) for target in node.targets]
    has_main = "main" in functions + values
    if "recipes" in file.parts[len(ROOT.parts) :] and (not has_main or file.stem == "cli"):
        return ""
    return (ast.get_docstring(module) or "").partition("\n")[0]


def versions() -> str:
    """The packages that `setup.py` always requires, with their versions."""
    asked = re.search(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text(encoding="utf-8"), re.DOTALL)
    assert asked is not None
    found = re.findall(r'"([\w-]+)([<>=][^"]*)"', asked[1])
    return "\n".join(["| package | versions |", "|---|---|", *(f"| {name} | `{rule}` |" for name, rule in found)])


def architectures() -> str:
    """Every model family that the tests steer, from the table that they compare with."""
    helpers = ROOT / "tests" / "helpers"
    module = ast.parse((helpers / "tiny_models.py").read_text(encoding="utf-8"))
    [every_test] = [
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "ARCHITECTURES" and node.value is not None
    ]
    lines = (helpers / "families.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    shown = ["| family | in every test of addition | ways that are steered right | the others |", "|---|---|---|---|"]
    for family, *ways in rows:
        others = "; ".join(dict.fromkeys(way for way in ways if way != "right"))
        right = f"{ways.count('right')} of {len(ways)}"
        shown.append(f"| `{family}` | {'yes' if family in every_test else ''} | {right} | {others} |")
    return "\n".join(shown)


TABLES = {"versions": versions, "architectures": architectures}
"""Name of a table -> what makes it."""
