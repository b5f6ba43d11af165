"""What was fixed before the first cell of a folder, and how often the design was changed after cells had run.

Adding seeds after looking at a result gives more chances to find something. So `grid.json` keeps a hash of the
card and the claim, which may not change once a cell has run, and every design (tasks, numbers of examples, seeds) that
cells ran for: with k of them, a claim is decided at `alpha / k` (Bonferroni over the looks).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steertune.recipes.ablation.grid import Grid
from steertune.recipes.ablation.keys import digest
from steertune.recipes.ablation.store import Store
from steertune.recipes.lab.files import ArmError, read_result

GRID = "grid.json"


def fixed(grid: Grid, folder: Path) -> dict[str, Any]:
    """The entries of `grid.json`: the hash of the card, and the designs up to this one.

    Raises:
        ArmError: the folder holds cells of a grid with another card or claim.
    """
    card, claim = grid.tables.card, grid.tables.claim
    assert card is not None and claim is not None  # a grid without them is refused when it is read
    key = digest([card.model_dump(mode="json"), claim.model_dump(mode="json")])
    design = {
        "tasks": [task.label for task in grid.tasks],
        "examples": grid.tables.examples,
        "seeds": grid.tables.seeds,
    }
    before = _before(folder)
    if before is None:
        return {"card_key": key, "looks": [design]}
    if before.get("card_key", key) != key:
        raise ArmError(
            f"[card] or [claim] differ from those that {folder / GRID} fixed before the first cell ran (hash "
            f"{before['card_key']}, now {key}): a claim that is made after looking at results does not count. Set "
            "them back, or give the new claim a --folder and seeds of its own."
        )
    looks = before.get("looks", [design])
    return {"card_key": key, "looks": looks if looks[-1] == design else [*looks, design]}


def _before(folder: Path) -> dict[str, Any] | None:
    """The `grid.json` that cells ran for; None if no cell has run.

    Raises:
        ArmError: cells have run, but the file is missing.
    """
    file = folder / GRID
    if Store(folder).is_empty:
        return None
    if not file.is_file():
        raise ArmError(
            f"{folder} holds cells but no {GRID}, the file that fixed their card before they ran. A claim that is "
            "made after looking at results does not count. Put the file back, or choose another --folder."
        )
    return read_result(file, "Run the grid again: it writes this file again and keeps the cells.")


def looks_of(grid: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The designs of a `grid.json` that cells ran for; older versions do not record them."""
    return list(grid.get("looks") or [])


def in_words(grid: Mapping[str, Any], alpha: float) -> str:
    """A sentence if the design was changed after cells had run; else an empty string."""
    looks = looks_of(grid)
    if len(looks) < 2:
        return ""
    changed = [name for name in looks[0] if any(look[name] != looks[0][name] for look in looks)]
    designs = "; then ".join(
        ", ".join(f"{name} {', '.join(map(str, look[name]))}" for name in changed) for look in looks
    )
    return (
        f"The design was changed after cells had run ({designs}). That is {len(looks)} looks at the result, so a "
        f"claim is decided at alpha = {alpha:g} / {len(looks)} = {alpha / len(looks):.3g}."
    )
