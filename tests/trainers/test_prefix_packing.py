"""Rows without padding: as the plain path, shared where they begin alike, and off where attention is not told."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import get_peft_model
from prefixes import assert_equal, assert_same_with_shortcut, both_ways, complaints, pair_batch, with_gradients
from tiny_data import demonstrations, pairs
from tiny_models import fill, tiny

from steertune.adapters import SteeringVectorConfig
from steertune.trainers import Batch, FrozenPrefix, ModelAt
from steertune.trainers.prefix import exactness, new_rows, packing
from steertune.trainers.prefix.cached_pass import CachedPass
from steertune.trainers.prefix.decoder import Decoder
from steertune.trainers.prefix.packing import common_layout
from steertune.trainers.prefix.prompts import row_lengths


@pytest.fixture(autouse=True)
def hears_everything(caplog):
    caplog.set_level(logging.INFO, logger="steertune.trainers.prefix")


@pytest.fixture
def layouts(monkeypatch):
    """The layouts that were really used."""
    used = []
    run = CachedPass._run_packed
    monkeypatch.setattr(
        CachedPass,
        "_run_packed",
        lambda self, call, h, layout, *more: used.append(layout) or run(self, call, h, layout, *more),
    )
    return used


def steered(base=None, **switches):
    model = get_peft_model(base or tiny(), SteeringVectorConfig(**{"layers": 2, **switches}))
    fill(model)
    return model


def unequal(lengths=(14, 5, 9, 3), system=3, seed=0) -> Batch:
    """Rows of unequal length that begin with the same tokens, padded on the right; the second half has labels."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randint(3, 64, (system,), generator=generator)
    rows = [torch.cat([head, torch.randint(3, 64, (n - system,), generator=generator)]) for n in lengths]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    column, ends = torch.arange(ids.shape[1]), torch.tensor(lengths)[:, None]
    labels = ids.masked_fill((column >= ends) | (column < (ends + system) // 2), -100)
    return Batch({"input_ids": ids, "attention_mask": (column < ends).long()}, labels, pairs=False)


# -- the layout -----------------------------------------------------------------------------------------------------


def test_a_layout_holds_each_beginning_once_and_no_padding():
    batch = unequal()
    layout = common_layout(batch.inputs, row_lengths(batch.inputs), None)
    assert layout is not None and len(layout.row_T) == 14 + 5 + 9 + 3 - 3 * 3
    ids, real = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    assert torch.equal(layout.unpacked(layout.packed(ids))[real], ids[real])


def test_rows_whose_prompts_end_elsewhere_share_what_is_steered_alike():
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]] * 2)
    call, lengths = {"input_ids": ids}, torch.tensor([6, 6])
    tokens = {
        ends: len(common_layout(call, lengths, torch.tensor(ends), at_least=0.0).row_T)  # pyright: ignore
        for ends in ((4, 4), (3, 5), (1, 5))
    }
    assert tokens == {(4, 4): 6, (3, 5): 6 + 4, (1, 5): 12}, "the last token of a prompt may be steered alone"


def test_full_rows_that_share_nothing_stay_as_they_are():
    ids = torch.arange(3, 15).view(2, 6)
    assert common_layout({"input_ids": ids}, torch.tensor([6, 6]), None) is None


# -- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.thinned(3)
@pytest.mark.parametrize("positions", ["all", "completion", "prompt", "last_prompt"])
def test_unequal_rows_are_exact_on_every_architecture(architecture, positions, layouts, caplog):
    model = steered(tiny(architecture), positions=positions)
    assert_same_with_shortcut(model, unequal())
    packs = FrozenPrefix().shortcut(model, True).packs
    assert bool(layouts) == packs and not complaints(caplog)
    assert packs or "rows keep their padding" in caplog.text


@pytest.mark.parametrize(
    ("model_type", "window"),
    [("mistral", {"sliding_window": 4}), ("gemma3_text", {"sliding_window": 4, "head_dim": 8}),
     ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0})],
)  # fmt: skip
def test_windows_shorter_than_rows_are_those_of_each_row(model_type, window, layouts, caplog):
    assert_same_with_shortcut(steered(tiny(model_type, **window)), unequal())
    assert layouts and not complaints(caplog)


def test_attention_that_confuses_rows_is_caught(monkeypatch, caplog):
    """A planted fault: every row is given the attention of another."""
    right = packing._in_32_bits_on_cpu
    monkeypatch.setattr(packing, "_in_32_bits_on_cpu", lambda *given: right(*given).flip(0))
    model = steered(layers=0)
    for block in model.get_base_model().model.layers:
        block.self_attn.o_proj.weight.data *= 20.0  # a random model hardly attends to anything
    assert_same_with_shortcut(model, unequal())
    assert "a pass without padding" in caplog.text and "differs by" in caplog.text


def test_eager_attention_keeps_its_padding_and_says_so(caplog):
    model = steered(tiny(attn_implementation="eager"))
    assert_same_with_shortcut(model, pair_batch())
    assert "rows keep their padding: LlamaModel with eager attention" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_as_near_as_sixteen_bits_are(dtype, layouts):
    model, batch = steered(), unequal()
    exact, _ = with_gradients(model, batch, None)
    with torch.autocast("cpu", dtype):
        plain, _ = with_gradients(model, batch, None)
        ours, _ = with_gradients(model, batch, FrozenPrefix().shortcut(model, True))
    assert layouts
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-3


def test_policy_and_reference_take_the_same_path(layouts):
    """In 16 bits an untrained adapter has a margin of exactly 0."""
    model, batch = get_peft_model(tiny(), SteeringVectorConfig(layers=1)).train(), pair_batch()
    shortcut = FrozenPrefix().shortcut(model, True)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), shortcut.on():
            at = ModelAt(model, model, batch)
            assert torch.equal(at(1).token_logps, at(0).token_logps)
    assert len(layouts) > 2


# -- new rows together ----------------------------------------------------------------------------------------------


def wide(**changes) -> Any:
    """Wide enough for rows to have the same bits together as alone."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 2}
    return tiny(**{**sizes, **changes})


def states(model, order, at_once: int, batch: Batch) -> dict[str, torch.Tensor]:
    """What is stored of rows that are met in this order, so many at once."""
    prefix = FrozenPrefix()
    shortcut = prefix.shortcut(model, True)
    for start in range(0, len(order), at_once):
        some = order[start : start + at_once]
        with torch.no_grad(), shortcut.on():
            model(**{name: value[some] for name, value in batch.inputs.items()}, use_cache=False)
    return prefix.memo._ram


def assert_same_bits(model, batch: Batch, expected: dict[str, torch.Tensor], at_once: tuple[int, int, int]) -> None:
    """Eight rows are stored alike in whatever order they are met, and however many at once."""
    orders = range(8), [7, 3, 5, 1, 0, 2, 6, 4], [4, 2, 6, 0, 7, 5, 1, 3]
    for order, count in zip(orders, at_once, strict=True):
        stored = states(model, order, count, batch)
        assert stored.keys() == expected.keys()
        assert all(torch.equal(stored[key], expected[key]) for key in expected)


def test_new_rows_have_the_same_bits_in_whatever_batch_they_are_met(monkeypatch):
    model, batch = steered(wide()), unequal((14, 9, 10, 12, 33, 21, 17, 8))
    calls = []
    state = Decoder.state
    monkeypatch.setattr(Decoder, "state", lambda self, call: calls.append(1) or state(self, call))
    expected = states(model, range(8), 1, batch)
    calls.clear()
    assert_same_bits(model, batch, expected, at_once=(8, 4, 2))
    # on other machines, rows as short as these run one by one
    if exactness.least_tokens(model.base_model.model.modules()) == 4:
        checks = 3 * 2 + 3 + 3 + 2  # modules below and randomness, then rows alone
        assert len(calls) == checks + 1 + 2 + 4


@pytest.mark.parametrize(("differing", "least"), [((), 4), ((5, 7), 8), ((64,), None), ((4, 300), None)])
def test_the_least_tokens_are_those_from_which_products_have_the_same_bits(differing, least, monkeypatch):
    def product(x, *_):
        return x * (1 + 2e-7) if len(x) in differing else x.clone()

    monkeypatch.setattr(torch.nn.functional, "linear", product)
    assert exactness.least_tokens([torch.nn.Linear(128, 128), torch.nn.ReLU()]) == least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_bits_depend_on_the_number_of_tokens_lines_are_filled(dtype, monkeypatch, caplog):
    """A planted fault: a matrix product rounds in another way at every number of tokens."""
    linear, eps = torch.nn.functional.linear, torch.finfo(dtype).eps

    def product(x, weight, *bias):
        return linear(x, weight, *bias) * (1 + eps * (x.shape[-2] % 3))

    monkeypatch.setattr(torch.nn.functional, "linear", product)
    monkeypatch.setattr(new_rows, "FILLED", {"cpu": 40})
    # 45 tokens are too many for a line, so that row runs alone
    model, batch = steered(wide()).to(dtype), unequal((14, 9, 10, 12, 33, 21, 17, 45))
    assert_same_bits(model, batch, states(model, range(8), 1, batch), at_once=(8, 4, 3))
    assert "one by one" not in caplog.text


def test_rows_that_round_otherwise_together_run_one_by_one(monkeypatch, caplog):
    """A planted fault: in a line, attention rounds otherwise."""
    model, batch = steered(wide()), unequal((14, 9, 21, 8))
    row_by_row = packing._row_by_row
    monkeypatch.setattr(packing, "_row_by_row", lambda *given: row_by_row(*given) * (1 + 2e-7))
    stored = states(model, [0, 1, 2, 3], 4, batch)
    monkeypatch.undo()
    expected = states(model, [0, 1, 2, 3], 1, batch)
    assert "new rows run one by one" in caplog.text
    assert all(torch.equal(stored[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_training_of_a_wide_model_is_equal(kind, tmp_path, caplog):
    data = pairs() if kind == "dpo" else demonstrations()
    loss = "dpo" if kind == "dpo" else "cross_entropy"
    ours, plain, _ = both_ways(
        kind, tmp_path, wide, loss=loss, gradient_checkpointing=True, **({"data": data} if data else {})
    )
    assert not complaints(caplog)
    assert_equal(ours, plain)
