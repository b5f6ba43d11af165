"""Guess from a column's name which part of an example it is; only for suggestions in errors, never for training."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from steertune.recipes.lab.tables import Part

_SYNONYMS: dict[Part, set[str]] = {
    "chosen": {"good", "positive", "pos", "preferred", "accepted", "better", "best", "winner", "win", "right",
               "correct"},
    "rejected": {"bad", "negative", "neg", "dispreferred", "refused", "worse", "worst", "loser", "lose", "wrong",
                 "incorrect", "non", "not"},
    "prompt": {"question", "instruction", "query", "input", "user", "request", "context", "ask"},
    "completion": {"answer", "response", "output", "reply", "assistant", "target"},
}  # fmt: skip
"""Words in column names, by the part of an example that they stand for."""
_GAP = "..."


def like(part: Part, names: Sequence[str]) -> list[str]:
    """The columns that may be a part of an example: its name in another case, else a synonym, else a misspelling of
    either."""
    words = {name: set(re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold())) for name in names}
    for meant in ({part}, _SYNONYMS[part]):
        if named := [name for name in names if words[name] & meant]:
            return named
    return [name for name in names if get_close_matches(name.casefold(), {part} | _SYNONYMS[part], cutoff=0.75)]


def suggested(names: Sequence[str]) -> dict[Part, str]:
    """Columns for the parts of a pair, or of a prompt with its completion; "..." for a part without a likely
    column."""
    columns: dict[Part, str] = {}
    rest = list(names)
    parts: tuple[Part, ...] = ("rejected", "chosen", "prompt")  # "dispreferred" is not a misspelt "preferred"
    for part in parts:
        for name in like(part, rest)[:1]:
            columns[part] = name
            rest.remove(name)
    answers = like("completion", rest)
    if len(answers) == 2 and not {"chosen", "rejected"} & columns.keys():
        columns["chosen"], columns["rejected"] = answers
        rest = [name for name in rest if name not in answers]
    elif "rejected" not in columns and (answers or ("chosen" in columns and not rest)):
        return {"prompt": columns.get("prompt", _GAP), "completion": answers[0] if answers else columns["chosen"]}
    # two whole texts have no separate prompt
    pair: list[Part] = ["chosen", "rejected"]
    if "prompt" in columns or not ((len(rest) == 2 and not columns) or (not rest and len(columns) == 2)):
        pair.insert(0, "prompt")
    missing: list[Part] = [part for part in pair if part not in columns]
    names_left = rest if len(rest) == len(missing) else [_GAP] * len(missing)
    for part, name in zip(missing, names_left, strict=True):
        columns[part] = name
    return {part: columns[part] for part in pair}


def as_options(columns: Mapping[Part, str]) -> str:
    """How a mapping of columns is written on the command line of each recipe."""
    table = "{" + ", ".join(f"{part} = {json.dumps(name, ensure_ascii=False)}" for part, name in columns.items()) + "}"
    words = " ".join(shlex.quote(f"{part}={name}") for part, name in columns.items())
    return (
        f"--data.columns {shlex.quote(table)} in train and distill, --columns {words} in other commands, columns = "
        f"{table} of a task in a grid"
    )
