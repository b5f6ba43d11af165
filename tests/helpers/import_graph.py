"""Which module of the package imports which, read from the source: inside functions and under TYPE_CHECKING too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx
from paths import ROOT

FOLDERS = ("adapters", "losses", "trainers", "recipes")


def name_of(file: Path) -> str:
    """`adapters/exports/__init__.py` -> `steertune.adapters.exports`."""
    return ".".join(["steertune", *file.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {name_of(file): file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}


def imports_of(name: str) -> Iterator[str]:
    """The modules of the package that a module imports."""
    file = MODULES[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            # `from ..a import b` in `steertune.x.y` imports from `steertune.a`, or imports the module `steertune.a.b`
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield from [n for n in (f"{source}.{alias.name}", source) if n in MODULES][:1]


def graph() -> networkx.DiGraph:
    """An edge from each module to each module that it imports."""
    edges = [(name, other) for name in MODULES for other in imports_of(name) if other != name]
    return networkx.DiGraph(edges)
