"""Every family of models, in every way of computing logits, is steered like the uncached reference, or refuses."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, RECURRENT, SEVERAL_STREAMS, TABLE, WAYS, entry
from peft import get_peft_model
from tiny_models import tiny

from steertune.adapters import SteeringVectorConfig

_QUICK = ["forward", "labels", "cached", "one row", "left-padded", "inside: cached"]
_IN_PARTS = [way for way in WAYS if way not in _QUICK]


def in_the_table(family: str, way: str) -> str:
    """What the committed table says: "right", or who refuses."""
    rows = [line.strip("| ").split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines()]
    [entries] = [row[1:] for row in rows if row[0] == family]
    return entries[list(WAYS).index(way)]


@pytest.mark.thinned(3, whole=["mamba-cached", "minimax-cached", "llama-inside"])
@torch.no_grad()
@pytest.mark.parametrize("way", _QUICK)
@pytest.mark.parametrize("family", [*RECURRENT, "llama"])
def test_recurrent_families_are_steered_like_the_reference(family, way):
    assert entry(family, way) == in_the_table(family, way)


@pytest.mark.thinned(3)
@torch.no_grad()
@pytest.mark.parametrize("way", _IN_PARTS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "lfm2", "minimax"])
def test_prefill_in_parts_is_steered_like_the_reference(family, way):
    assert entry(family, way) == in_the_table(family, way)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_of_every_family(family):
    for way in WAYS:
        assert entry(family, way) == in_the_table(family, way)


@pytest.mark.parametrize("family", SEVERAL_STREAMS)
def test_several_streams_are_refused_at_injection(family):
    base = tiny(family, **FAMILIES[family])
    with pytest.raises(ValueError, match="several parallel streams.*Use site='attention' or site='mlp'"):
        get_peft_model(base, SteeringVectorConfig())


def test_the_table_has_every_family_and_way():
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")][1:] == list(FAMILIES)
    assert f"| family | {' | '.join(WAYS)} |" in lines
