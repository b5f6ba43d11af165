"""Look things up by name, and suggest the nearest name for a misspelt one.

In many folders of this package, each file defines one item, which is looked up by the name of the file.
`steertune.losses` does not use this module, because it imports nothing but torch.
"""

from __future__ import annotations

import difflib
import importlib
import math
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def did_you_mean(value: object, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` if one of the allowed values is similar, else an empty string."""
    near = difflib.get_close_matches(str(value), list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def choose(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise a ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {list(allowed)}.{did_you_mean(value, allowed)}")


def file_names(*folders: str | Path) -> list[str]:
    """The modules of folders (the `__path__` of a package) whose names do not start with an underscore, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(map(str, folders)) if not m.name.startswith("_"))


def by_name(what: str, package: str, folder: Path, kind: type, name: object, options: Mapping[str, Any]) -> Any:
    """Create the dataclass that a module defines, from its options. An object of `kind` is returned unchanged.

    Args:
        what: A word for it in error messages.
        package: The name of the package that the modules belong to.
        folder: The folder of the package.
        kind: The base class of the dataclasses.
        name: The name of the module, or an object of `kind`.
        options: The fields of the dataclass.

    Raises:
        ValueError: an unknown name or option (the message suggests the nearest one), a value of the wrong type, or
            options for an object.
    """
    if isinstance(name, kind):
        if options:
            raise ValueError(f"Options {sorted(options)} go with the name of a {what}, not with an object.")
        return name
    _choose(what, name, file_names(folder))
    module = importlib.import_module(f"{package}.{name}")
    classes = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
    [dataclass] = [x for x in classes if issubclass(x, kind) and is_dataclass(x)]
    hints = get_type_hints(dataclass)
    for option, value in options.items():
        _choose(f"option of {what} {name!r}", option, [field.name for field in fields(dataclass)])
        if not _has_type(value, hints[option]):
            given = type(value).__name__
            raise ValueError(f"{option}={value!r:.100} of {what} {name!r} is {given}, not {_in_words(hints[option])}.")
    return dataclass(**options)


def _has_type(value: object, hint: Any) -> bool:
    """Whether a value, from TOML or Python, has a type; types that are not checked here pass."""
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return any(_has_type(value, part) for part in get_args(hint))
    if kind in (int, float):
        number = isinstance(value, int) or (kind is float and isinstance(value, float) and math.isfinite(value))
        return number and not isinstance(value, bool)
    if kind is tuple:
        return isinstance(value, list | tuple)
    return kind not in (str, bool) or isinstance(value, kind)


def _in_words(hint: Any) -> str:
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return " or ".join(_in_words(part) for part in get_args(hint))
    return {float: "a finite number", int: "a whole number", str: "a string", tuple: "a list"}.get(kind, str(kind))


def _choose(what: str, value: object, allowed: list[str]) -> None:
    if value not in allowed:
        names = ", ".join(map(repr, allowed)) or "none"
        raise ValueError(f"Unknown {what} {value!r}. Available: {names}.{did_you_mean(value, allowed)}")
