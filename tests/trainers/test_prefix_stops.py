"""One pass up to the highest cut keeps the states of the lower ones: what a sweep over layers lives on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from prefixes import pair_batch
from tiny_models import fill, tiny

from steertune.adapters import SteeringVectorConfig
from steertune.trainers import FrozenPrefix, ModelAt, share_weights
from steertune.trainers.prefix.decoder import Decoder


def at_layer(base, layer: int, **switches):
    model = get_peft_model(share_weights(base), SteeringVectorConfig(layers=layer, **switches))
    fill(model, seed=layer)
    return model.eval()


def logps(model, prefix: FrozenPrefix | None = None):
    with torch.no_grad():
        if prefix is None:
            return ModelAt(model, model, pair_batch())(1).token_logps
        with prefix.on(model):
            return ModelAt(model, model, pair_batch())(1).token_logps


@pytest.mark.thinned(3)
def test_states_behind_lower_blocks_are_those_computed_for_them_alone(architecture):
    base = tiny(architecture)
    shared = FrozenPrefix(stops=[1, 2, 3])
    logps(base, shared)  # the base model itself: the highest cut of all
    for layer in (2, 1, 0):
        kept = len(shared.memo)
        alone = FrozenPrefix()
        model = at_layer(base, layer)
        assert torch.equal(logps(model, shared), logps(model, alone)), layer
        assert len(shared.memo) == kept, "its keys are those that the pass of the base left"
        torch.testing.assert_close(logps(model, shared), logps(model), rtol=0, atol=1e-5)


def test_after_one_pass_no_row_runs_below_a_cut_again(monkeypatch):
    base = tiny()
    prefix = FrozenPrefix(stops=[2, 3])
    logps(base, prefix)
    models: dict[int, Any] = {layer: at_layer(base, layer) for layer in (2, 1)}
    lora = LoraConfig(r=2, target_modules=["down_proj"], layers_to_transform=[2], task_type="CAUSAL_LM")
    models[-2] = get_peft_model(share_weights(base), lora).eval()  # changes block 2 itself: its cut is below it
    ran: list[int] = []
    state = Decoder.state
    monkeypatch.setattr(Decoder, "state", lambda self, call: ran.append(self.count) or state(self, call))
    for model in models.values():
        logps(model, prefix)
    assert ran == [3, 2, 2], "one row each, on which a model's lower blocks are checked"


@pytest.mark.parametrize("stops", [[0], [4], [9], [-1]])
def test_stops_that_no_pass_comes_by_are_no_harm(stops):
    base, prefix = tiny(), FrozenPrefix(stops=stops)
    model = at_layer(base, 2)
    torch.testing.assert_close(logps(model, prefix), logps(model), rtol=0, atol=1e-5)
    assert len(prefix.memo) == len(pair_batch().labels)
