"""Pairs whose prompts share no words, as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

ENDS = ("nto", "rvel", "stik", "mpa", "lgor", "xuv", "dram")
NOUNS = ["".join(parts) for parts in product("bdfgkl", "aeiou", ENDS)]


def pair(prompt: str) -> dict[str, Any]:
    """A pair whose answers say the prompt again."""
    return {"prompt": prompt, "chosen": f"Yes to {prompt}", "rejected": f"No to {prompt}"}


def unlike(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Pairs whose prompts share no words; `start` gives others."""
    return [pair(f"{NOUNS[2 * i]} {NOUNS[2 * i + 1]}") for i in range(start, start + count)]


def write(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Write rows as JSON Lines; return the file's name."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)
