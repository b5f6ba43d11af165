"""Find the strengths at which a trained model has given KLs to the base, on the neutral rows for matching."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from steertune.recipes.ablation.matched import Point, frontier
from steertune.recipes.lab.batches import batches
from steertune.recipes.lab.likelihood import NEUTRAL_BATCH, answer_logps
from steertune.recipes.lab.observe import HeldOut, against_base
from steertune.trainers import Batch, scaled

SEARCH_ROWS = 4
"""Number of rows with which the search starts."""
MeasuredKLs = dict[tuple[float, int], float]
"""(strength, number of rows, always the first ones for matching) -> KL to the base."""


def strengths_at(
    model: Any,
    held_out: HeldOut,
    targets: Sequence[float],
    largest: float,
    size: int = NEUTRAL_BATCH,
    measured: MeasuredKLs | None = None,
) -> tuple[list[Point], bool]:
    """Find the strength of every KL, measured on the rows for matching.

    Args:
        model: The model.
        held_out: The rows for matching, and the base model's log-probabilities on them.
        targets: The KLs to reach.
        largest: The largest strength to try.
        size: Rows per forward pass.
        measured: KLs of this model that were measured before; new ones are added.

    Returns:
        A point for every target, the smallest first, and whether the KL was seen to fall while the strength grew.
    """
    matching, base = held_out.matching, held_out.base_logps("matching")
    assert matching is not None

    @cache
    def shown(rows: int) -> list[Batch]:
        return batches(held_out.tokenizer, matching.select(range(rows)), size)

    kls = {} if measured is None else measured

    def kl(strength: float, rows: int) -> float:
        if (strength, rows) not in kls:
            with scaled(model, strength):
                logps = answer_logps(model, shown(rows))
            observed = against_base(logps, base)
            kls[strength, rows] = sum(observed["neutral_kl"]) / sum(observed["neutral_tokens"])
        return kls[strength, rows]

    few, every = min(SEARCH_ROWS, len(base)), len(base)
    before = {strength: value for (strength, rows), value in kls.items() if rows == every}
    return frontier(lambda s: kl(s, few), lambda s: kl(s, every), targets, largest, before)
