"""The frozen prefix changes what a step costs and nothing else."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from prefixes import (
    assert_equal,
    assert_same_with_shortcut,
    both_ways,
    complaints,
    fill_lora,
    off_because,
    pair_batch,
)
from tiny_data import demonstrations, history, pairs, trained, trainer
from tiny_models import fill, of_the_prefix, tiny
from transformers import TrainerCallback

from steertune.adapters import SteeringVectorConfig
from steertune.trainers import Batch, FrozenPrefix, ModelAt
from steertune.trainers.prefix import cached_pass
from steertune.trainers.prefix.cached_pass import CachedPass
from steertune.trainers.prefix.decoder import Decoder
from steertune.trainers.prefix.prompts import prompts_are_constant
from steertune.trainers.prefix.store import _placed_sum, weights_key


@pytest.fixture(autouse=True)
def hears_everything(caplog):
    caplog.set_level(logging.INFO, logger="steertune.trainers.prefix")


@pytest.fixture
def tokens_run(monkeypatch):
    """Rows x columns of every pass through the blocks above the cut."""
    seen = []
    run = Decoder.run

    def spy(self, call, state):
        seen.append(tuple(call["input_ids"].shape))
        return run(self, call, state)

    monkeypatch.setattr(Decoder, "run", spy)
    return seen


@pytest.fixture
def splits_run(monkeypatch):
    """The ways to run a batch otherwise than row by row that were really used: in one line, or in two parts."""
    seen = []
    run_packed, run_split = CachedPass._run_packed, cached_pass.run_split

    def packed(self, call, states, layout):
        seen.append(layout)
        return run_packed(self, call, states, layout)

    def split(model, decoder, call, states, split):
        seen.append(split)
        return run_split(model, decoder, call, states, split)

    monkeypatch.setattr(CachedPass, "_run_packed", packed)
    monkeypatch.setattr(cached_pass, "run_split", split)
    return seen


# -- equal to the plain path ----------------------------------------------------------------------------------------


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", ["dpo", "sft", "plain"])
def test_training_is_equal_on_every_architecture(architecture, kind, tmp_path, caplog):
    data = pairs() if kind == "dpo" else demonstrations()
    loss = "dpo" if kind == "dpo" else "cross_entropy"
    ours, plain, prefix = both_ways(kind, tmp_path, lambda: tiny(architecture), data=data, loss=loss)
    assert not complaints(caplog)
    assert len(prefix.memo) >= len(data)
    assert_equal(ours, plain)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("positions", ["all", "completion", "prompt", "last_prompt"])
def test_shared_prompts_are_exact_on_every_architecture(architecture, positions, splits_run, caplog):
    model = get_peft_model(tiny(architecture), SteeringVectorConfig(positions=positions))
    fill(model)
    assert_same_with_shortcut(model, pair_batch())
    assert not complaints(caplog) and len(splits_run) >= 2


@pytest.mark.parametrize("form", ["gated", "linear", "low_rank"])
@pytest.mark.parametrize("norm", [dict(norm="free"), dict(norm="preserve"), dict(norm="capped", norm_value=0.5)])
def test_forms_and_norms(form, norm, splits_run):
    rank = dict(rank=2) if form == "low_rank" else {}
    model = get_peft_model(tiny(), SteeringVectorConfig(form=form, layers=[1, 3], **norm, **rank))
    fill(model)
    assert_same_with_shortcut(model, pair_batch())
    assert splits_run


@pytest.mark.parametrize("site", ["attention", "mlp"])
def test_a_site_inside_a_block_keeps_that_block(site):
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=2, site=site))
    fill(model)
    assert FrozenPrefix().shortcut(model, True).skipped == 2
    assert_same_with_shortcut(model, pair_batch())


def test_lora_on_upper_layers_skips_and_on_all_layers_shares_prompts(splits_run):
    for layers, skipped in (([2, 3], 2), (None, 0)):
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=layers)
        model = get_peft_model(tiny(), config)
        fill_lora(model)
        assert FrozenPrefix().shortcut(model, True).skipped == skipped
        before = len(splits_run)
        assert_same_with_shortcut(model, pair_batch())
        assert len(splits_run) > before


@pytest.mark.thinned(3)
@pytest.mark.parametrize("data", [pairs, demonstrations])
def test_completions_only_are_exact_on_every_architecture(architecture, data, tmp_path, tokens_run, caplog):
    kind, loss = ("dpo", "dpo") if data is pairs else ("sft", "cross_entropy")
    config = SteeringVectorConfig(positions="completion")
    ours, plain, _ = both_ways(
        kind, tmp_path, lambda: tiny(architecture), data=data(), loss=loss, peft_config=config, max_steps=6
    )
    assert not complaints(caplog)
    assert_equal(ours, plain)
    longest = max(len(row) for row in ours.train_dataset[next(iter(ours.train_dataset.features))])
    last = tokens_run[-1]
    assert last[0] == (8 if data is pairs else 4) and last[1] < longest


def test_completions_only_is_for_completions_only():
    for changes in ({}, {"positions": "prompt"}, {"positions": "completion", "modules_to_save": ["lm_head"]}):
        model = get_peft_model(tiny(), SteeringVectorConfig(layers=2, **changes))
        assert not prompts_are_constant(model, training=True)
    assert not prompts_are_constant(tiny(), training=False)
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=2, positions="completion"))
    assert prompts_are_constant(model, training=True)
    model.get_base_model().lm_head.weight.requires_grad_(True)
    assert not prompts_are_constant(model, training=True) and prompts_are_constant(model, training=False)


def test_without_labels_only_every_token_is_right():
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=2, positions="completion")).eval()
    fill(model)
    batch = pair_batch()
    with torch.no_grad():
        expected = model(**batch.inputs, labels=batch.labels, use_cache=False).logits
        with FrozenPrefix().shortcut(model).on():
            found = model(**batch.inputs, labels=batch.labels, use_cache=False).logits
    real = batch.inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)


def test_blocks_below_do_not_run_and_prompts_run_once(tokens_run):
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=2))
    fill(model)
    shortcut, batch = FrozenPrefix().shortcut(model, True), pair_batch()
    with shortcut.on():
        ModelAt(model, model, batch)(1)
    ran = []
    for block in model.get_base_model().model.layers:  # no hooks, which would turn the memo off
        plain = block.self_attn.forward
        block.self_attn.forward = lambda *a, i=block.self_attn.layer_idx, f=plain, **k: (ran.append(i), f(*a, **k))[1]
    tokens_run.clear()
    with shortcut.on():
        ModelAt(model, model, batch)(1)
    assert ran == [3]  # the vector is on the output of block 2
    assert tokens_run == [(1, 5 + 3 + 2 + 4 + 3 + 1)], "two prompts and four answers, without padding"


def test_the_parents_own_loss_is_equal_too(tmp_path):
    for kind in ("dpo", "sft"):
        ours, plain, prefix = both_ways(kind, tmp_path / kind, loss=None, peft_config=SteeringVectorConfig())
        assert_equal(ours, plain)
        assert len(prefix.memo)


def test_the_reference_runs_once_per_row(tmp_path, monkeypatch):
    seen = []
    compute = ModelAt._compute_reference

    def spy(self, batch, **asked):
        seen.append(len(batch.labels))
        return compute(self, batch, **asked)

    monkeypatch.setattr(ModelAt, "_compute_reference", spy)
    ours, plain, _ = both_ways("dpo", tmp_path, loss="dpo", max_steps=6)
    assert seen[:16] == [1] * 16, "8 pairs, each answer alone"
    assert seen[16:] == [8] * 6, "the plain path: every batch"
    assert_equal(ours, plain)


def test_evaluation_and_generation_inside(tmp_path):
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=2)).eval()
    fill(model)
    batch = pair_batch()
    expected = model.generate(input_ids=batch.inputs["input_ids"][:, :3], max_new_tokens=4, do_sample=False)
    with torch.no_grad(), FrozenPrefix().shortcut(model).on():
        ModelAt(model, model, batch)(1)
        found = model.generate(input_ids=batch.inputs["input_ids"][:, :3], max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)


def test_left_padding_and_given_positions(caplog):
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=2))
    fill(model)
    right = pair_batch()
    padding = (1 - right.inputs["attention_mask"]).sum(1).tolist()
    assert any(padding)

    def shifted(rows):
        return torch.stack([row.roll(n) for row, n in zip(rows, padding, strict=True)])

    left = Batch({k: shifted(v) for k, v in right.inputs.items()}, shifted(right.labels), pairs=True)
    assert_same_with_shortcut(model, left)
    positions = torch.arange(right.labels.shape[1]).expand_as(right.labels) + 3
    assert_same_with_shortcut(model, Batch({**right.inputs, "position_ids": positions}, right.labels, pairs=True))
    assert not of_the_prefix(caplog)


# -- off, and says why -----------------------------------------------------------------------------------------------


def test_dropout_below_is_off_and_dropout_above_is_not(caplog, splits_run):
    for rate, where in ((0.5, 0), (0.5, 3)):
        caplog.clear()
        model = get_peft_model(tiny(), SteeringVectorConfig(layers=1)).train()
        fill(model)
        block = model.get_base_model().model.layers[where]
        block.add_module("some_dropout", torch.nn.Dropout(rate))
        block.mlp.register_forward_hook(lambda m, _, out, block=block: block.some_dropout(out))
        shortcut = FrozenPrefix().shortcut(model, True)
        with shortcut.on():
            ModelAt(model, model, pair_batch())(1)
        assert shortcut.skipped == (0 if where == 0 else 2)
        assert not splits_run, "random numbers differ between the rows of a pair"
        if where == 0:
            off_because(caplog, "some_dropout.p=0.5 below the trained layers makes its output random")


def test_another_adapter_is_proven_again(tokens_run):
    """One proof of a model says nothing of other adapters on it, in another precision."""
    prefix, batch = FrozenPrefix(), pair_batch()
    proofs = []
    for switches in (
        dict(layers=2),
        dict(layers=2),
        dict(layers=2, positions="completion"),
        dict(layers=2, form="gated"),
    ):
        model = get_peft_model(tiny(), SteeringVectorConfig(**switches))
        fill(model)
        before = len(prefix._proven)
        with torch.no_grad(), prefix.shortcut(model).on():
            ModelAt(model, model, batch)(1)
        proofs.append(len(prefix._proven) > before)
    assert proofs == [True, False, True, True]


# -- what goes wrong inside ------------------------------------------------------------------------------------------


class Broken(RuntimeError):
    """A fault of our own."""


class BreakAfter(TrainerCallback):
    """Breaks something when a number of steps is done."""

    def __init__(self, steps, act):
        self.steps, self.act = steps, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.steps:
            self.act()


def with_lora_dropout():
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[2, 3], lora_dropout=0.3)
    return get_peft_model(tiny(), config)


def break_in(monkeypatch, place: str) -> None:
    def broken(*args, **kwargs):
        torch.rand(3)  # and it has drawn random numbers before
        raise Broken(place)

    monkeypatch.setattr(f"steertune.trainers.prefix.{place}", broken)


@pytest.mark.parametrize(
    "place",
    [
        "cached_pass.frozen_blocks", "cached_pass.rows_of", "cached_pass.shared_prompts", "cached_pass.run_split",
        "cached_pass.draws", "cached_pass.row_lengths", "cached_pass.common_layout", "packing._in_32_bits_on_cpu",
        "cached_states.row_key", "cached_states.weights_key", "cached_states.rows_of", "cached_states.side_by_side",
        "new_rows.alone_layout", "new_rows.least_tokens", "cached_states.CachedStates.keep", "store.TensorStore.put",
        "store.TensorStore.get", "store.TensorStore.refresh", "prompts.continue_prompts", "prompts.row_lengths",
        "decoder.Decoder.state",
    ],
)  # fmt: skip
@pytest.mark.parametrize("when", ["from the start", pytest.param("in the middle", marks=pytest.mark.slow)])
def test_whatever_goes_wrong_inside_changes_nothing(place, when, tmp_path, monkeypatch, caplog):
    """Also with random numbers above the cut: an error must not move them."""
    config = SteeringVectorConfig(positions="completion" if place.startswith("prompts") else "all")

    def options(folder):
        if place in ("cached_pass.draws", "decoder.Decoder.state"):
            dropout = dict(model=with_lora_dropout(), disable_dropout=False)
            return dict(folder=tmp_path / folder, loss="dpo", max_steps=4, **dropout)
        # whose rows run in two parts
        model = dict(model=tiny("bloom")) if "shared_prompts" in place or "run_split" in place else {}
        return dict(folder=tmp_path / folder, loss="dpo", max_steps=4, peft_config=config, **model)

    plain = trained("dpo", frozen_prefix=False, **options("plain"))
    made = trainer("dpo", **options("ours"))
    if when == "in the middle":
        made.add_callback(BreakAfter(2, lambda: break_in(monkeypatch, place)))
    else:
        break_in(monkeypatch, place)
    made.train()
    monkeypatch.undo()
    assert_equal(made, plain)
    warnings = [record.getMessage() for record in of_the_prefix(caplog) if record.levelno >= logging.WARNING]
    assert len(warnings) == len(set(warnings)) <= 3


@pytest.mark.parametrize("block", [0, 3])
@pytest.mark.parametrize("loss", ["dpo", "cross_entropy", None])
def test_an_error_of_the_model_itself_is_raised(block, loss, tmp_path, caplog):
    made = trainer("dpo", tmp_path, loss=loss)

    def broken(*args, **kwargs):
        raise KeyError("the model's own")

    made.model.get_base_model().model.layers[block].mlp.forward = broken
    with pytest.raises(KeyError, match="the model's own"):
        made.train()
    assert "failed" not in caplog.text


LONG = "the cat runs the dog sits red blue "


@pytest.mark.parametrize("positions", ["completion", "prompt", "last_prompt"])
@pytest.mark.parametrize("loss", ["dpo", "cross_entropy"])
def test_prompts_of_very_different_lengths(loss, positions, tmp_path):
    """The shortcuts are proven with a vector of zeros; most prompts are first met when it is not zero any more."""
    prompts = ("the sea ", LONG, "now go ", "a " + LONG, "you stay ", "you " + LONG, "red sky ", "red " + LONG)
    rows = [{"prompt": p, "chosen": "sea now", "rejected": "then we stay"} for p in prompts]
    config = SteeringVectorConfig(layers=1, positions=positions)
    options = {"data": Dataset.from_list(rows), "loss": loss, "peft_config": config, "max_steps": 4}
    options |= {"per_device_train_batch_size": 2, "learning_rate": 0.5}
    ours, plain, _ = both_ways("dpo", tmp_path, **options)
    assert_equal(ours, plain)


@pytest.mark.parametrize("positions", ["completion", "prompt", "last_prompt"])
def test_rows_that_begin_alike_and_whose_prompts_end_elsewhere(positions):
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=1, positions=positions)).eval()
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]] * 2)
    ids[1, 6:] = torch.tensor([11, 12])
    labels = ids.clone()
    labels[0, :3], labels[1, :6] = -100, -100
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, pairs=False)
    prefix = FrozenPrefix()
    with torch.no_grad(), prefix.shortcut(model).on():
        ModelAt(model, model, batch)(1)  # it is proven with a vector of zeros
    fill(model)
    with torch.no_grad():
        expected = ModelAt(model, model, batch)(1).token_logps
        with prefix.shortcut(model).on():
            found = ModelAt(model, model, batch)(1).token_logps
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# -- what a proof and a memo cannot know -----------------------------------------------------------------------------


def test_a_hook_below_is_off_and_leaves_no_stale_state(caplog):
    """Activation addition by hand on a lower block, and taken away again."""
    model, prefix = get_peft_model(tiny(), SteeringVectorConfig(layers=2)), FrozenPrefix()
    batch = pair_batch()
    with torch.no_grad():
        plain = ModelAt(model, model, batch)(1).token_logps
        handle = model.get_base_model().model.layers[0].register_forward_hook(lambda m, a, out: out + 1.0)
        with prefix.shortcut(model, training=True).on():
            hooked = ModelAt(model, model, batch)(1).token_logps
        handle.remove()
        with prefix.shortcut(model, training=True).on():
            ours = ModelAt(model, model, batch)(1).token_logps
    assert "a LlamaDecoderLayer below the trained layers has a forward hook" in caplog.text
    assert (hooked - plain).abs().max() > 1e-3
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_noise_that_rounds_away_is_noise(caplog):
    """Random numbers below the cut, too small to be seen in 16 bits beside one large coordinate."""
    model = tiny(dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 50.0
    plain = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: plain(x + 1e-3 * torch.rand_like(x) if model.training else x)
    model = get_peft_model(model, SteeringVectorConfig(layers=2)).train()
    with torch.no_grad(), FrozenPrefix().shortcut(model, training=True).on():
        ModelAt(model, model, pair_batch())(1)
    assert "differs in training" in caplog.text


@pytest.mark.parametrize("model_type", ["mpt", "gpt_neo", "llama4_text"])
def test_equal_prompts_prove_nothing_about_unequal_ones(model_type, caplog):
    small = {
        "mpt": {},
        "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8, "num_layers": 4},
        "llama4_text": {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8},
    }
    model = get_peft_model(tiny(model_type, **small[model_type]), SteeringVectorConfig(layers=2))
    shortcut = FrozenPrefix().shortcut(model, training=True)
    for prompts in ((6, 6), (12, 3)):
        batch = pair_batch(prompts, ((2, 4), (3, 1)))
        with torch.no_grad():
            plain = ModelAt(model, model, batch)(1).token_logps
            with shortcut.on():
                ours = ModelAt(model, model, batch)(1).token_logps
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


def test_positions_that_start_again_are_packing(caplog):
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=2))
    ids = torch.randint(3, 30, (1, 8), generator=torch.Generator().manual_seed(0))
    shortcut = FrozenPrefix().shortcut(model, training=True)
    for positions in (range(8), [0, 1, 2, 3, 0, 1, 2, 3]):
        inputs = {"input_ids": ids, "position_ids": torch.tensor([[*positions]]), "use_cache": False}
        with torch.no_grad():
            plain = model(**inputs).logits
            with shortcut.on():
                ours = model(**inputs).logits
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    assert "pack several texts in one" in caplog.text


def test_weights_in_another_order_are_other_weights():
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    order = torch.arange(64)
    order[[3, 11, 40]] = torch.tensor([11, 40, 3])
    keys = {weights_key([("w", w)]) for w in (weight, weight[order], weight.clone(), weight.T.contiguous().T)}
    assert len(keys) == 2
    bits = weight.view(torch.int32).flatten().tolist()
    expected = sum(bit * (2 * i + 1) for i, bit in enumerate(bits)) % (1 << 64)
    assert _placed_sum(weight.view(-1).view(torch.int32)) == expected


def test_the_sum_of_places_is_the_same_in_chunks(monkeypatch):
    bits = torch.randint(-(2**31), 2**31, (1000,), generator=torch.Generator().manual_seed(0)).int()
    whole = _placed_sum(bits)
    monkeypatch.setattr("steertune.trainers.prefix.store._CHUNK", 96)
    assert _placed_sum(bits) == whole


def test_prompt_tuning_s_own_tokens_are_no_labels(tmp_path):
    """Tokens that the adapter puts first move every position: our cross-entropy is TRL's."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    made = [
        trained("sft", tmp_path / str(loss), peft_config=config, loss=loss, max_steps=1, learning_rate=0.0,
                frozen_prefix=False)
        for loss in (None, "cross_entropy")
    ]  # fmt: skip
    [first], [second] = (history(one, "loss") for one in made)
    assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)


def test_random_numbers_above_the_cut_keep_rows_whole(splits_run, caplog):
    """A router's jitter, say: both answers of a pair would see the same noise on their prompt, in every epoch."""
    for positions in ("all", "completion"):
        caplog.clear()
        model = get_peft_model(tiny(), SteeringVectorConfig(layers=1, positions=positions)).train()
        block = model.get_base_model().model.layers[3]
        plain = block.mlp.forward
        block.mlp.forward = lambda x, f=plain, m=block: f(x * (1 + 0.1 * torch.rand_like(x)) if m.training else x)
        prefix = FrozenPrefix()
        with torch.no_grad(), prefix.shortcut(model, training=True).on(labels_only=True):
            ModelAt(model, model, pair_batch())(1)
        assert len(prefix.memo) == 4 and not splits_run, "states of four rows, and no keys and values"
        off_because(caplog, "no row is run in parts: training draws random numbers")


def test_states_are_those_of_evaluation():
    """A user's own pass in training mode, through what was made for evaluation."""
    model = get_peft_model(tiny(attention_dropout=0.5), SteeringVectorConfig(layers=2)).eval()
    prefix = FrozenPrefix()
    shortcut = prefix.shortcut(model)
    model.train()
    with torch.no_grad(), shortcut.on():
        ModelAt(model, model, pair_batch())(1)
    assert shortcut.skipped == 0 and not len(prefix.memo)


def test_a_proof_takes_two_rows(tokens_run):
    model = get_peft_model(tiny(), SteeringVectorConfig(layers=2)).eval()
    lengths = (6, 3, 5, 9, 4)
    ids = torch.nn.utils.rnn.pad_sequence([torch.arange(3, 3 + n) for n in lengths], batch_first=True)
    mask = (ids != 0).long()
    with torch.no_grad(), FrozenPrefix().shortcut(model).on():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    line = [(2, 9), (1, 9)]  # plain and in one line, in which all rows are beginnings of the longest
    assert tokens_run == [(2, 9), (2, 9), *line, (1, 9)], "plain and with the memo, and the batch"
