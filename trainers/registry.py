"""Find a class by the name of its file."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..adapters.checks import did_you_mean

_TYPE_NAMES = {float: "a finite number", int: "a whole number", str: "a text", tuple: "a list"}


def file_names(folder: Path) -> list[str]:
    """The public modules of a folder."""
    return sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_"))


def by_name(what: str, package: str, folder: Path, kind: type, name: object, options: Mapping[str, Any]) -> Any:
    """Make the dataclass that a module defines from its options; return an object of `kind` unchanged.

    Args:
        what: What the classes are called in messages.
        package: Name of the package that the modules belong to.
        folder: Folder of the package.
        kind: The class that each module defines one subclass of.
        name: Name of a module, or such an object.
        options: Fields of the dataclass.

    Raises:
        ValueError: the name or an option is unknown (the message names the nearest), a value has the wrong type, or
            options come with an object.
    """
    if isinstance(name, kind):
        if options:
            raise ValueError(f"Options {sorted(options)} go with the name of a {what}, not with an object.")
        return name
    _check_choice(what, name, file_names(folder))
    module = importlib.import_module(f"{package}.{name}")
    classes = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
    [made] = [x for x in classes if issubclass(x, kind) and is_dataclass(x)]
    hints = get_type_hints(made)
    for option, value in options.items():
        _check_choice(f"option of {what} {name!r}", option, [field.name for field in fields(made)])
        if not _matches(value, hints[option]):
            given = type(value).__name__
            raise ValueError(
                f"{option}={value!r:.100} of {what} {name!r} is {given}, not {_type_name(hints[option])}."
            )
    return made(**options)


def _matches(value: object, hint: Any) -> bool:
    """Whether a value from TOML or Python has a type; types that cannot be checked accept every value."""
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return any(_matches(value, part) for part in get_args(hint))
    if kind in (int, float):
        number = isinstance(value, int) or (kind is float and isinstance(value, float) and math.isfinite(value))
        return number and not isinstance(value, bool)
    if kind is tuple:
        return isinstance(value, list | tuple)
    return kind not in (str, bool) or isinstance(value, kind)


def _type_name(hint: Any) -> str:
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return " or ".join(_type_name(part) for part in get_args(hint))
    return _TYPE_NAMES.get(kind, str(kind))


def _check_choice(what: str, value: object, allowed: list[str]) -> None:
    if value not in allowed:
        raise ValueError(f"Unknown {what} {value!r}; there are {allowed}.{did_you_mean(value, allowed)}")
