"""The command `steertune`: every recipe is a subcommand, named by its file.

    steertune --help
    steertune train vector_sft --data.name my_pairs.jsonl
    steertune --install-completion

`steertune train` is `python -m steertune.recipes.train`. A recipe is a file of this folder, or of `studies/`, that
defines `main`. Its options are read from the file, and it is imported only when it runs, so that help, completion and
errors appear at once.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

from steertune.recipes.lab.command_line import Command, Group, run
from steertune.recipes.lab.parsing import SETTINGS, RootGroup

_HERE = Path(__file__).parent
_FOLDERS = (_HERE / "studies", _HERE)
"""Studies come first, since a module of this folder can be the former name of one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in commands():
        return load(words[0])(words[1:])
    code = run(_root(), "steertune", words or ["--help"])
    return code if words else 2


def commands() -> dict[str, str]:
    """Every recipe with the first line of its docstring."""
    lines = {}
    for file in sorted((f for folder in _FOLDERS for f in folder.glob("*.py")), key=lambda f: f.stem):
        module = ast.parse(file.read_text(encoding="utf-8"))
        if file != Path(__file__) and "main" in _definitions(module):
            lines.setdefault(file.stem, (ast.get_docstring(module) or "").split("\n")[0])
    return lines


def find(name: str) -> tuple[Path, str]:
    """The file of a recipe, and its module name."""
    file = next(file for folder in _FOLDERS if (file := folder / f"{name}.py").is_file())
    return file, f"{__package__}.{name}" if file.parent == _HERE else f"{__package__}.studies.{name}"


def load(name: str) -> Callable[[Sequence[str]], int]:
    """A recipe's `main`; until it runs, only its options are read."""
    file, module = find(name)
    return outline(file, module) or importlib.import_module(module).main


def outline(file: Path, module: str) -> Command | Group | None:
    """The command that a file defines, without the imports of its functions: they import the module when called.

    Returns:
        The command; None if `main` is a function that parses its arguments itself.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    defined = _definitions(tree)
    main = defined["main"]
    if isinstance(main, ast.FunctionDef):
        if not main.decorator_list:
            return None
        called = ["main"]
    else:  # main = group(add, subtract)
        called = [node.id for node in ast.walk(main) if isinstance(node, ast.Name) and node.id in defined][1:]
        called = [name for name in called if isinstance(defined[name], ast.FunctionDef)]
    for name in called:  # keep the docstring; the body runs in the real module
        stub: Any = defined[name]
        stub.body = [*stub.body[:1], *ast.parse(f"return _imported({name!r})(**locals())").body]
    needed = _needed("main", defined)
    docstring = [ast.Expr(ast.Constant(ast.get_docstring(tree, clean=False) or ""))]
    future = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    tree.body = [*docstring, *future, *(node for node in tree.body if node in needed and node not in future)]

    def imported(name: str) -> Callable[..., Any]:
        real = vars(importlib.import_module(module))[name]
        return real.function if isinstance(real, Command) else real

    space: dict[str, Any] = {"__name__": module, "__file__": str(file), "_imported": imported}
    exec(compile(ast.fix_missing_locations(tree), str(file), "exec"), space)
    return space["main"]


def _needed(name: str, defined: dict[str, ast.stmt]) -> set[ast.stmt]:
    """The statements of a module that a name depends on."""
    needed: set[ast.stmt] = set()
    names = [name]
    while names:
        node = defined.get(names.pop())
        if node is not None and node not in needed:
            needed.add(node)
            names += [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    return needed


def _definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """The statement that defines each name of a module."""
    return {name: node for node in tree.body for name in _names(node)}


def _names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.Assign):
        yield from (part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id


def _root() -> Any:
    """The command `steertune` for typer: its help, and the completion of every recipe's options."""
    app = typer.Typer(add_completion=True, rich_markup_mode=None, context_settings=SETTINGS)

    @app.callback(cls=RootGroup, help=__doc__, invoke_without_command=False)
    def steertune(
        version: Annotated[
            bool, typer.Option("--version", help="Show the version and exit.", callback=_version)
        ] = False,
    ) -> None:
        pass

    root: Any = get_command(app)
    for name, line in commands().items():
        panel = None if find(name)[0].parent == _HERE else "Studies of this project"
        root.add_command(_Listed(name, help=line, rich_help_panel=panel))
    return root


def _version(asked: bool) -> None:
    if asked:
        print(f"steertune {version('steertune')}")
        raise typer.Exit


class _Listed(TyperCommand):
    """A recipe in the list of commands; its file is read when its options are needed."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        assert self.name is not None
        recipe = load(self.name)
        made = recipe.build() if isinstance(recipe, Command | Group) else super()
        return made.make_context(info_name, args, parent=parent, **extra)


if __name__ == "__main__":
    sys.exit(main())
