"""Ours beside the stock trainers, over generated combinations of options (see `differential.py`)."""

from __future__ import annotations

import pytest
from differential import draw, problem


def wrong(seeds: range, folder) -> tuple[list[str], int]:
    """The cases that went wrong, and how many were refused."""
    found = {seed: problem(draw(seed), folder / str(seed)) for seed in seeds}
    bad = [f"{seed}: {what} ({draw(seed)})" for seed, what in found.items() if what not in (None, "refused")]
    return bad, sum(what == "refused" for what in found.values())


@pytest.mark.parametrize("block", range(6))
def test_ours_equals_the_stock_trainer_or_refuses_by_name(block, tmp_path):
    bad, refused = wrong(range(8 * block, 8 * block + 8), tmp_path)
    assert bad == [] and refused < 8


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_ours_equals_the_stock_trainer_in_many_more(block, tmp_path):
    bad, refused = wrong(range(1000 + 20 * block, 1020 + 20 * block), tmp_path)
    assert bad == [] and refused < 14
