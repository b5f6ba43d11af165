"""Read the rows of a local file, and find the place of each row in it."""

from __future__ import annotations

import csv
import glob
import json
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, load_dataset

from steertune.recipes.lab.files import ArmError, read_text

_DECODES = "decode_example"
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_file(path: Path) -> Dataset:
    """The rows of a local file. Every field of a CSV file is read as text, `NA` and `007` too.

    Raises:
        ArmError: the file has another format, is damaged or empty, or has rows that do not match its first line.
    """
    if path.suffix not in BUILDERS:
        raise ArmError(f"{path} must end in one of {sorted(BUILDERS)}.")
    if path.stat().st_size == 0:
        raise ArmError(f"{path} is empty: rows are expected.")
    options: dict[str, Any] = {} if path.suffix == ".parquet" else {"encoding_errors": "strict"}
    if path.suffix == ".csv":
        columns = Features({name: Value("string") for name in _header(path)})
        options |= {"features": columns, "keep_default_na": False, "na_filter": False, "header": 0}
    try:
        rows: Any = load_dataset(BUILDERS[path.suffix], data_files=glob.escape(str(path)), split="train", **options)
    except Exception as error:  # the parsers raise many kinds, mostly chained
        why = str(error.__cause__ or error).strip().rstrip(".!")
        raise ArmError(
            f"{path} cannot be read as {BUILDERS[path.suffix]}: {why}. It must have rows in UTF-8, all with the same "
            "columns."
        ) from error
    try:
        rows.data.validate(full=True)  # reads every text as UTF-8, which the parsers do not
    except ValueError as error:
        raise ArmError(f"{path} is damaged: {error}. Save it as UTF-8.") from error
    # decoding a column can open a file or an address that it names; "Json" is only text or numbers
    decoded = {name: type(feature).__name__ for name, feature in rows.features.items() if hasattr(feature, _DECODES)}
    if opened := [name for name, kind in decoded.items() if kind != "Json"]:
        raise ArmError(f"{path}: columns {opened} hold pictures or sound; text is expected. Remove them.")
    return rows


def place(path: Path, index: int) -> str:
    """The place of a row, for messages: `file:line`, or the number of the row in a parquet file."""
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader, number, end = csv.reader(file), -1, 0  # row -1 is the header
                for row in reader:
                    start, end = end + 1, reader.line_num
                    if row and number == index:
                        return f"{path}:{start}"
                    number += bool(row)
        elif path.suffix in (".json", ".jsonl"):
            text = read_text(path, "JSON")
            start = _in_list(text, index) if text.lstrip().startswith("[") else _in_lines(text, index)
            return f"{path}:{text.count(chr(10), 0, start) + 1}"
    except (ValueError, IndexError, csv.Error):
        pass  # a layout that only the parser understands
    return f"{path}, row {index + 1}"


def _header(path: Path) -> list[str]:
    """The columns that the first line of a CSV file names.

    Raises:
        ArmError: it names a column twice, or rows have more fields.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = (row for row in csv.reader(file) if row)
            names, first = next(rows, []), next(rows, [])
    except (csv.Error, UnicodeDecodeError) as error:
        raise ArmError(
            f"{path} cannot be read as csv: {error}. It must have rows in UTF-8, all with the same columns."
        ) from error
    if len(first) > len(names) or "" in names:
        extra = max(len(first) - len(names), names.count(""))
        raise ArmError(
            f"{path}: its rows have {extra} more fields than its first line names. Name every column there."
        )
    if names and not first:
        raise ArmError(f"{path} has a first line that names columns, and no rows. Add rows.")
    if len(names) == 1 and (mark := next((mark for mark in ";\t|" if mark in names[0]), None)):
        raise ArmError(f"{path}: its fields are separated by {mark!r}. Save it with commas, or as JSON lines.")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ArmError(f"{path}: its first line names the column {repeated[0]!r} twice. Rename one.")
    return names


def _in_lines(text: str, index: int) -> int:
    """Where a line of JSON Lines begins, counting lines that are not empty."""
    start = 0
    for line in text.split("\n"):
        if line.strip():
            if index == 0:
                return start
            index -= 1
        start += len(line) + 1
    raise IndexError(index)


def _in_list(text: str, index: int) -> int:
    """Where an object of a JSON list begins."""
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    for number in range(index + 1):
        while text[at] in " \t\r\n,":
            at += 1
        if number == index:
            return at
        at = decoder.raw_decode(text, at)[1]
    raise IndexError(index)
