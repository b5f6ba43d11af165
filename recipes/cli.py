"""The command `steertune`: every recipe is a subcommand, named by its file.

    steertune --help
    steertune train vector_dpo --data.name my_pairs.jsonl

is `python -m steertune.recipes.train vector_dpo ...`. A recipe is a file of this folder, or of `studies/`, with a
function `main`; nothing is imported before one is asked for.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

_HERE = Path(__file__).parent
_FOLDERS = (_HERE, _HERE / "studies")


def commands() -> dict[str, str]:
    """Every recipe and the first line of its docstring."""
    found = {}
    for file in sorted((f for folder in _FOLDERS for f in folder.glob("*.py")), key=lambda f: f.stem):
        module = ast.parse(file.read_text(encoding="utf-8"))
        defines_main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body)
        if defines_main and file != Path(__file__):
            found[file.stem] = (ast.get_docstring(module) or "").split("\n")[0]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    known = commands()
    if not words or words[0] in ("-h", "--help"):
        print(_help(known))
        return 0 if words else 2
    name, *rest = words
    if name == "--version":
        from importlib.metadata import version

        print(f"steertune {version('steertune')}")
        return 0
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        print(f"steertune: unknown command {name!r}.{hint}\n\n{_help(known)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"{__package__}.{_module(name)}").main(rest)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on where it stopped.", file=sys.stderr)
        return 130


def _module(name: str) -> str:
    return name if (_HERE / f"{name}.py").is_file() else f"studies.{name}"


def _help(known: dict[str, str]) -> str:
    width = max(map(len, known))
    lines = [f"  {name:<{width}}  {text}" for name, text in known.items()]
    return "\n".join(["usage: steertune COMMAND ...", "", *lines, "", "steertune COMMAND --help says more."])


if __name__ == "__main__":
    sys.exit(main())
