"""Read and write files of data, never of code; a file that is damaged is refused.

Results carry a checksum of their content, so that a file that was truncated, or changed in a single bit, is an error
(or is computed again) and never taken for a result. A file without a checksum, written by hand, is accepted.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

_CHECKSUM, _KIND = "checksum", "blake2b-"
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{i}" for port in ("COM", "LPT") for i in range(10))}
_LONGEST_NAME = 200  # bytes; file systems take 255, and names get endings


class ArmError(ValueError):
    """Invalid input of a recipe; the message names the value and what is valid."""


def shown(value: Any, length: int = 80) -> str:
    """A value for an error message: its repr on one line, shortened if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print numbers of more than 4300 digits
        text = f"a number of more than 4300 digits ({type(value).__name__})"
    return text if len(text) <= length else f"{text[: length - 3]}..."


def nearest(value: str, allowed: Sequence[str]) -> str:
    """The end of an error message: " Did you mean ...?", or nothing if no allowed value is similar."""
    near = difflib.get_close_matches(value, allowed, n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""


def reasons(error: ValidationError) -> str:
    """The errors of pydantic, on one line."""
    problems = []
    for e in error.errors():
        where, message = ".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")
        got = f" (got {e['input']})" if e["type"] == "finite_number" else ""
        problems.append(f"{where}: {message}{got}" if where else f"{message}{got}")
    return "; ".join(problems)


def check_name(what: str, name: str) -> None:
    """Refuse a name that cannot be a folder's name, or that would lead outside its parent.

    Raises:
        ArmError: it has characters other than ASCII letters, digits and `_ = , + - .` (others look alike), starts
            with ".", or is too long for a file system.
    """
    if not re.fullmatch(r"[\w=,+-][\w=,+.-]*", name, re.ASCII) or len(name) > _LONGEST_NAME:
        raise ArmError(
            f"{what} {shown(name)} cannot name a folder: use letters (a-z), digits, '_', '-' and '.', at most "
            f"{_LONGEST_NAME} characters, without a '.' in front."
        )
    if name.partition(".")[0].upper() in _DEVICES or name.endswith("."):
        raise ArmError(
            f"{what} {name!r} cannot name a folder on Windows, where it is a device or loses its last '.'. Choose "
            "another name."
        )


def check_place(folder: Path) -> None:
    """Refuse a folder that cannot be created, before the work whose results go there.

    Raises:
        ArmError: a file is in the way, or nothing can be written there.
    """
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise ArmError(f"{folder}: cannot write to {parent} ({error.strerror}). Choose another folder.") from error


def read_text(file: Path, what: str = "text") -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises:
        ArmError: it does not exist, is not a file, cannot be read, or is not valid UTF-8.
    """
    if file.exists() and not file.is_file():
        raise ArmError(f"{file} is not a file: {what} is expected.")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArmError(f"{file} is not valid {what}: byte {error.start} is not UTF-8. Save it as UTF-8.") from error
    except OSError as error:
        raise ArmError(f"{file} cannot be read: {error.strerror}.") from error


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file of the package."""
    return [json.loads(line) for line in read_text(file, "JSON").splitlines()]


def read_toml(file: Path) -> dict[str, Any]:
    """A TOML file.

    Raises:
        ArmError: it cannot be read, or is not valid TOML.
    """
    text = read_text(file, "TOML")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of more than 4300 digits
        raise ArmError(f"{file} is not valid TOML: {error}") from error


def toml_value(text: str) -> Any:
    """The value of a command-line word, written as in TOML; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def write_whole(file: Path, text: str) -> None:
    """Write a file atomically: the whole text or nothing."""
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def write_result(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON object with its checksum, whole or not at all."""
    write_whole(file, json.dumps({**content, _CHECKSUM: _checksum(content)}, indent=1))


def read_result(file: Path, fix: str) -> dict[str, Any]:
    """The content of a file that `write_result` wrote. `fix` tells the user what to do about a damaged file.

    Raises:
        ArmError: the file cannot be read, or is damaged.
    """
    return _checked(read_text(file, "JSON"), str(file), fix)


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows of JSON, each with its checksum and the last one with their number, whole or not at all."""
    lines = [{**row, _CHECKSUM: _checksum(row)} for row in rows]
    end = {"rows": len(lines)}
    lines.append({**end, _CHECKSUM: _checksum(end)})
    write_whole(file, "".join(json.dumps(line) + "\n" for line in lines))


def read_rows(file: Path, fix: str) -> list[dict[str, Any]]:
    """The rows of a file that `write_rows` wrote; arguments and errors are those of `read_result`."""
    lines = read_text(file, "JSON").splitlines()
    rows = [_checked(line, f"{file}, line {i + 1}", fix) for i, line in enumerate(lines)]
    if not rows or rows[-1] != {"rows": len(rows) - 1}:
        raise ArmError(f"{file} is damaged (its end is missing). {fix}")
    return rows[:-1]


def _checked(text: str, where: str, fix: str) -> dict[str, Any]:
    try:
        content = json.loads(text, object_pairs_hook=without_repeats)
        if not isinstance(content, dict):
            raise ValueError(f"a JSON object is expected, this is {type(content).__name__}")
        # also found by its value, since a bit of its key may have changed
        marked = [key for key, value in content.items() if isinstance(value, str) and value.startswith(_KIND)]
        checksum = content.pop(_CHECKSUM, None)
        if (checksum is not None and checksum != _checksum(content)) or marked not in ([], [_CHECKSUM]):
            raise ValueError("its checksum does not match")
    except (ValueError, RecursionError) as error:
        raise ArmError(f"{where} is damaged ({error}). {fix}") from error
    return content


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return content


def _checksum(content: dict[str, Any]) -> str:
    """The checksum of a file's content, independent of the order of its keys and its white space."""
    as_read = json.loads(json.dumps(content))
    return _KIND + hashlib.blake2b(json.dumps(as_read, sort_keys=True).encode(), digest_size=16).hexdigest()
