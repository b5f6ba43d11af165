"""Every family of models, in every way of computing logits, is steered like the uncached reference, or refuses."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, POSITIONS, RECURRENT, SEVERAL_STREAMS, TABLE, WAYS, result

_QUICK = ["forward", "labels", "cached", "one row", "left-padded", "inside: cached"]
_IN_PARTS = [way for way in WAYS if way not in _QUICK]


@torch.no_grad()
@pytest.mark.parametrize("way", _QUICK)
@pytest.mark.parametrize("family", [*RECURRENT, "llama"])
def test_recurrent_families_are_steered_like_the_reference(family, way):
    for positions in POSITIONS:
        result(family, way, positions)


@torch.no_grad()
@pytest.mark.parametrize("way", _IN_PARTS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "lfm2", "minimax"])
def test_prefill_in_parts_is_steered_like_the_reference(family, way):
    for positions in POSITIONS:
        result(family, way, positions)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_of_every_family(family):
    for way in WAYS:
        for positions in POSITIONS:
            result(family, way, positions)


@pytest.mark.parametrize("family", SEVERAL_STREAMS)
def test_several_streams_are_refused_at_injection(family):
    assert result(family, "forward", "all") == "refused by name"


def test_the_table_has_every_family_and_way():
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")][1:] == list(FAMILIES)
    assert f"| family | {' | '.join(WAYS)} |" in lines
