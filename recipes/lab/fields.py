"""The fields of a dataclass, read from its source file: importing TRL or PEFT takes seconds, reading them does not.

A field's text is its `metadata={"help": ...}`, the docstring below it, or its entry under `Args:` of the class.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class FieldText:
    """A field as shown in the help.

    Attributes:
        name: Its name.
        type: Its annotation as written in the file.
        default: Its default as Python writes it; None: the field is required.
        text: What it means.
    """

    name: str
    type: str
    default: str | None
    text: str


def fields_of(module: str, name: str) -> dict[str, FieldText]:
    """The fields of a dataclass and of the classes it derives from, in the order of `dataclasses.fields`.

    Raises:
        LookupError: no file of the module defines the class.
    """
    home, node = _definition(module, name)
    fields: dict[str, FieldText] = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name):
            try:
                parent, definition = _definition(home, base.id)
            except LookupError:
                continue  # of the standard library
            if is_dataclass(definition):  # annotations of other classes do not define fields
                fields |= fields_of(parent, base.id)
    return fields | {field.name: field for field in fields_in(home, node)}


def classes_in(module: str) -> list[ast.ClassDef]:
    """The classes that a module defines."""
    return [node for node in _parsed(_file(module)).body if isinstance(node, ast.ClassDef)]


def is_dataclass(node: ast.ClassDef) -> bool:
    """Whether a class is decorated as a dataclass."""
    return any(ast.unparse(mark).startswith("dataclass") for mark in node.decorator_list)


def arguments_of(module: str, name: str) -> list[FieldText]:
    """The keyword-only arguments of a function."""
    tree = _parsed(_file(module))
    [node] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    texts = documented(ast.get_docstring(node))
    return [
        FieldText(
            word.arg,
            _type(module, word.annotation),
            None if value is None else ast.unparse(value),
            texts.get(word.arg, ""),
        )
        for word, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    ]


def fields_in(module: str, node: ast.ClassDef) -> Iterator[FieldText]:
    """The fields that a class of a module adds to its bases."""
    texts = documented(ast.get_docstring(node))
    for line, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
            continue
        if ast.unparse(line.annotation).startswith("ClassVar"):
            continue
        default, text = _value(line.value)
        name = line.target.id
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(str(following.value.value).split())
        yield FieldText(name, _type(module, line.annotation), default, text or texts.get(name, ""))


def documented(docstring: str | None) -> dict[str, str]:
    """The text of each argument under `Args:` in a docstring, by name, on one line each."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(docstring or ""), re.DOTALL | re.MULTILINE)
    if section is None:
        return {}
    entries = re.split(r"^ {4}(\w+)(?: \(.*?\))?: ", section[1], flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(entries[1::2], entries[2::2], strict=True)}


def _value(value: ast.expr | None) -> tuple[str | None, str]:
    """Default and help of a field, from what it is assigned: a value, `field(...)`, or pydantic's `Field(...)`."""
    if not (isinstance(value, ast.Call) and ast.unparse(value.func).removeprefix("dataclasses.").lower() == "field"):
        return (None if value is None else ast.unparse(value)), ""
    given = {word.arg: word.value for word in value.keywords}
    default = ast.unparse(given["default"]) if "default" in given else None
    if "default_factory" in given:
        made = given["default_factory"]
        default = ast.unparse(made.body) if isinstance(made, ast.Lambda) else f"{ast.unparse(made)}()"
        default = {"list()": "[]", "dict()": "{}"}.get(default, default)
    return default, _help(given.get("metadata"))


def _help(metadata: ast.expr | None) -> str:
    """The text under `help`; only the constant parts of a concatenated string are read."""
    if isinstance(metadata, ast.Dict):
        for key, value in zip(metadata.keys, metadata.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "help":
                texts = [n.value for n in ast.walk(value) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                return " ".join(" ".join(texts).replace("%%", "%").split())
    return ""


def _type(module: str, annotation: ast.expr | None) -> str:
    """An annotation as text, with aliases of `Literal[...]` and of unions written out."""
    if annotation is None:
        return "Any"
    written = ast.unparse(annotation)
    for name in {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}:
        try:
            _, alias = _find(module, name)
        except (LookupError, ImportError):
            continue  # a builtin, or of the standard library
        if isinstance(alias, ast.Assign) and isinstance(alias.value, ast.Subscript | ast.BinOp):
            written = re.sub(rf"\b{name}\b", ast.unparse(alias.value), written)
    return written


def _definition(module: str, name: str) -> tuple[str, ast.ClassDef]:
    """The module that defines a class, and its definition."""
    home, node = _find(module, name)
    if not isinstance(node, ast.ClassDef):
        raise LookupError(f"{name!r} of {module} is not a class.")
    return home, node


def _find(module: str, name: str) -> tuple[str, ast.stmt]:
    """The module that defines a class or an alias, and the definition; imports are followed, also those for type
    checkers.

    Raises:
        LookupError: the module's file neither defines nor imports it.
    """
    node = _names(module).get(name)
    if node is None:
        raise LookupError(f"{module} defines no {name!r}.")
    if not isinstance(node, ast.ImportFrom):
        return module, node
    package = module if _file(module).name == "__init__.py" else module.rpartition(".")[0]
    home = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
    return _find(home, next(alias.name for alias in node.names if (alias.asname or alias.name) == name))


@cache
def _names(module: str) -> dict[str, ast.stmt]:
    """What a module's file imports from others, and the classes and names that it defines."""
    tree = _parsed(_file(module))
    names: dict[str, ast.stmt] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: node for alias in node.names}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = node
    return names


@cache
def _file(module: str) -> Path:
    """The source file of a module, found without importing the package it belongs to."""
    top, *parts = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is not None and spec.origin is None and parts:  # a namespace package: importing it runs nothing
        spec = importlib.util.find_spec(f"{top}.{parts.pop(0)}")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        home = Path(folder, *parts)
        for file in (home / "__init__.py", home.with_suffix(".py")):
            if file.is_file():
                return file
    raise LookupError(f"{module} has no source file.")


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))
