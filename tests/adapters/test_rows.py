"""Rows of one batch, each with vectors, strengths and positions of its own."""

from __future__ import annotations

import pytest
import torch
from tiny_models import fill, hooks_on, steered, tiny, tokens

from steertune.adapters import SteeringVectorConfig, prompt_length, set_strength, steering_layers
from steertune.adapters.rows import RowVector, steer_rows

PROMPT = 5


@pytest.fixture(scope="module")
def model():
    made = steered(layers=[1, 2])
    made.add_adapter("other", SteeringVectorConfig(layers=[2, 3], norm="preserve", positions="completion"))
    fill(made, "other", seed=3)
    return made.eval()


ROWS = [
    [],
    [RowVector("default", 2.0)],
    [RowVector("default", -1.0, "completion"), RowVector("other", 0.5)],
    [RowVector("other", 0.5), RowVector("default", -1.0, "completion")],
    [RowVector("other", 3.0, "all")],
    [RowVector("default", 1.0, "last_prompt"), RowVector("other", 1.0, "prompt")],
]


def apart(model, row, ids) -> torch.Tensor:
    """One row by itself: PEFT's active adapters in their order, the strength and the positions set for the model."""
    model.base_model.set_adapter([vector.adapter for vector in row] or ["default"])
    for vector in row:
        set_strength(model, vector.strength, vector.adapter)
    before = {name: config.positions for name, config in model.peft_config.items()}
    for vector in row:
        model.peft_config[vector.adapter].positions = vector.positions or before[vector.adapter]
    try:
        with prompt_length(model, PROMPT), model.disable_adapter() if not row else torch.no_grad():
            return model(input_ids=ids).logits
    finally:
        for name, positions in before.items():
            model.peft_config[name].positions = positions
        set_strength(model, 1.0)


@torch.no_grad()
def test_each_row_is_steered_as_it_would_be_alone(model):
    ids = tokens(rows=len(ROWS))
    hooks = hooks_on(model)
    with steer_rows(model, ROWS), prompt_length(model, PROMPT):
        mixed = model.get_base_model()(input_ids=ids).logits
    assert hooks_on(model) == hooks
    for i, row in enumerate(ROWS):
        assert torch.allclose(mixed[i], apart(model, row, ids[i : i + 1])[0], atol=1e-5), row
    assert not torch.allclose(mixed[2], mixed[3], atol=1e-3), "rows differ"


@torch.no_grad()
def test_a_plain_model_has_rows_without_vectors_only():
    base, ids = tiny(), tokens()
    with steer_rows(base, [[], []]):
        assert torch.equal(base(input_ids=ids).logits, base(input_ids=ids).logits)
    with (
        pytest.raises(ValueError, match="no steering vector 'x'. It has \\[\\]"),
        steer_rows(base, [[RowVector("x")]]),
    ):
        pass


@torch.no_grad()
def test_positions_of_a_row_need_the_prompts_end(model):
    with (
        pytest.raises(ValueError, match="does not say where the prompt ends"),
        steer_rows(model, [[RowVector("default", 1.0, "completion")]] * 2),
    ):
        model.get_base_model()(input_ids=tokens())
    assert len(steering_layers(model, "default")) == 2
