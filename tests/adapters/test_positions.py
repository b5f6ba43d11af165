"""Which tokens are steered: in training, in cached generation, with padding on either side, with and without PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from families import added, model_of
from peft import get_peft_model
from tiny_models import fill, hooks_on, steered, tiny, tokens, vector_of
from transformers import DynamicCache

from steertune.adapters import SteeringVectorConfig, prompt_length

LAYER = 1
POSITIONS = ["all", "completion", "prompt", "last_prompt"]
SAID = ["completion", "prompt", "last_prompt"]  # those that must be told where the prompt ends
PROMPT, NEW = 5, 4


def moved(model, **inputs) -> torch.Tensor:
    """Boolean (rows, tokens): where the residual stream after block LAYER is not the base's."""
    with torch.no_grad():
        after = model(**inputs, output_hidden_states=True).hidden_states[LAYER + 1]
        with model.disable_adapter():
            before = model(**inputs, output_hidden_states=True).hidden_states[LAYER + 1]
    return (after - before).norm(dim=-1) > 1e-3


def greedy(model, ids: torch.Tensor, new: int = NEW, **kwargs):
    """Greedy tokens, and the logits each was chosen from: `(rows, new, vocabulary)`."""
    kwargs = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, **kwargs}
    out = model.generate(input_ids=ids, output_logits=True, return_dict_in_generate=True, **kwargs)
    return out.sequences, torch.stack(out.logits, dim=1)


# -- training: labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "positions, expected",
    [
        ("all", [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
        ("completion", [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]),
        ("prompt", [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]),
        ("last_prompt", [[0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]]),
    ],
)
def test_labels_say_where_the_prompt_ends(positions, expected):
    ids = tokens(2, 6)
    labels = ids.clone()
    labels[0, :2] = labels[1, :4] = -100
    model = steered(layers=LAYER, positions=positions)
    assert moved(model, input_ids=ids, labels=labels).int().tolist() == expected


def test_a_row_without_labels_is_all_prompt():
    ids = tokens(2, 4)
    labels = torch.full_like(ids, -100)
    labels[0, 3] = ids[0, 3]
    inputs = {"input_ids": ids, "labels": labels}
    assert moved(steered(layers=LAYER, positions="prompt"), **inputs).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert not moved(steered(layers=LAYER, positions="completion"), **inputs)[1].any()


def test_the_last_prompt_token_is_a_real_one():
    """A prompt padded on its right: `p p . . | c c`."""
    ids = tokens(1, 6)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    labels = torch.where(torch.arange(6) < 4, -100, ids)
    model = steered(layers=LAYER, positions="last_prompt")
    assert moved(model, input_ids=ids, attention_mask=mask, labels=labels).int().tolist() == [[0, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("positions", SAID)
def test_a_forward_that_does_not_say_is_refused(positions):
    ids = tokens()
    model = steered(positions=positions)
    model(input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match=f"positions='{positions}'.*does not say where the prompt ends.*labels"):
        model(input_ids=ids)


def test_prompt_length_ends_with_its_block():
    ids = tokens()
    model = steered(layers=LAYER, positions="prompt")
    with prompt_length(model, 3):
        with pytest.raises(RuntimeError, match="inner"), prompt_length(model, 5):
            assert moved(model, input_ids=ids).sum(dim=1).tolist() == [5, 5]
            raise RuntimeError("inner")
        assert moved(model, input_ids=ids).sum(dim=1).tolist() == [3, 3]
    with pytest.raises(ValueError, match="does not say"):
        model(input_ids=ids)


def test_prompt_length_per_row_and_before_labels():
    ids = tokens()
    model = steered(layers=LAYER, positions="prompt")
    with prompt_length(model, torch.tensor([2, 6])):
        assert moved(model, input_ids=ids, labels=ids).sum(dim=1).tolist() == [2, 6]


# -- padding --------------------------------------------------------------------------------------------------------


@pytest.mark.thinned(3)
@torch.no_grad()
@pytest.mark.parametrize("told_by", ["labels", "prompt_length"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_padding_on_either_side_changes_nothing(model_type, positions, side, told_by):
    model = steered(tiny(model_type), layers=LAYER, positions=positions)
    rows = [(tokens(1, 5, seed=1)[0], 2), (tokens(1, 8, seed=2)[0], 5)]  # ids, prompt length
    columns = max(len(ids) for ids, _ in rows)
    batch = torch.zeros(len(rows), columns, dtype=torch.long)
    mask, labels, ends, alone = torch.zeros_like(batch), torch.full_like(batch, -100), [], []
    for i, (ids, prompt) in enumerate(rows):
        start = columns - len(ids) if side == "left" else 0
        batch[i, start : start + len(ids)], mask[i, start : start + len(ids)] = ids, 1
        labels[i, start + prompt : start + len(ids)] = ids[prompt:]
        ends.append(start + prompt)
        with prompt_length(model, prompt):
            alone.append(model(input_ids=ids[None]).logits[0])
    inputs = {"input_ids": batch, "attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)}
    if told_by == "labels":
        logits = model(**inputs, labels=labels).logits
    else:
        with prompt_length(model, torch.tensor(ends)):
            logits = model(**inputs).logits
    torch.testing.assert_close(logits[mask.bool()], torch.cat(alone), rtol=1e-4, atol=1e-5)


# -- generation -----------------------------------------------------------------------------------------------------


@pytest.mark.thinned(3, whole=["llama"])
@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
def test_cached_generation_is_the_full_forward(architecture, positions):
    model = steered(tiny(architecture), layers=LAYER, positions=positions)
    sequences, logits = greedy(model, tokens(2, PROMPT))
    with prompt_length(model, PROMPT):
        full = model(input_ids=sequences).logits[:, PROMPT - 1 : -1]
    torch.testing.assert_close(logits, full, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
def test_generation_without_cache_is_the_same(positions):
    model = steered(layers=LAYER, positions=positions)
    sequences, logits = greedy(model, tokens(2, PROMPT))
    sequences_2, logits_2 = greedy(model, tokens(2, PROMPT), use_cache=False)
    assert torch.equal(sequences, sequences_2)
    torch.testing.assert_close(logits, logits_2, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_static_cache_is_the_same(model_type, positions):
    """It prepares 4-D masks, for models with several kinds of layers in a dictionary."""
    model = steered(tiny(model_type), layers=LAYER, positions=positions)
    _, logits = greedy(model, tokens(2, PROMPT))
    _, static = greedy(model, tokens(2, PROMPT), cache_implementation="static", disable_compile=True)
    torch.testing.assert_close(logits, static, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_four_positions_differ_and_completion_leaves_the_first_token_alone():
    ids = tokens(2, PROMPT)
    _, base = greedy(tiny(), ids)
    logits = {p: greedy(steered(layers=LAYER, positions=p), ids)[1] for p in POSITIONS}
    for i, one in enumerate(POSITIONS):
        assert not torch.allclose(logits[one], base, atol=1e-3)
        assert all(not torch.allclose(logits[one], logits[two], atol=1e-3) for two in POSITIONS[i + 1 :])
    torch.testing.assert_close(logits["completion"][:, 0], base[:, 0], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
def test_left_padded_generation_is_the_same(positions):
    model = steered(layers=LAYER, positions=positions)
    short, long = tokens(1, 3, seed=1), tokens(1, 5, seed=2)
    batch = torch.cat([torch.cat([torch.zeros(1, 2, dtype=torch.long), short], dim=1), long])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    _, logits = greedy(model, batch, attention_mask=mask)
    alone = torch.cat([greedy(model, ids)[1] for ids in (short, long)])
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
def test_generation_from_embeddings_is_the_same(positions):
    model = steered(layers=LAYER, positions=positions)
    ids = tokens(2, PROMPT)
    embeddings = model.get_input_embeddings()(ids)
    new = model.generate(inputs_embeds=embeddings, min_new_tokens=NEW, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(new, greedy(model, ids)[0][:, PROMPT:])


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("positions", POSITIONS)
def test_beam_search_scores_are_those_of_the_full_forward(positions, use_cache):
    model = steered(layers=LAYER, positions=positions)
    out = model.generate(
        input_ids=tokens(2, PROMPT), num_beams=3, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW,
        use_cache=use_cache, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    with prompt_length(model, PROMPT):
        logits = model(input_ids=out.sequences).logits[:, PROMPT - 1 : -1]
    logits[..., model.config.eos_token_id] = -torch.inf  # min_new_tokens forbids it before the softmax is taken
    raw = logits.log_softmax(dim=-1).gather(2, out.sequences[:, PROMPT:, None]).squeeze(2)
    assert raw.shape == (2, NEW)
    spread = (raw.sum(dim=1) / NEW - out.sequences_scores).abs().max()
    assert spread < 0.03  # the mass of the forbidden token, 1/64, is all they may differ by


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
def test_chunked_prefill_is_the_full_forward(positions):
    model = steered(layers=LAYER, positions=positions)
    ids = tokens()
    with prompt_length(model, 6):
        full = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :4], use_cache=True)
        second = model(input_ids=ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    chunks = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(chunks, full, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_is_in_the_cache_was_the_prompt():
    """Nothing else being said: the tokens that found the cache empty are the prompt, all later ones the completion."""
    ids = tokens(2, 6)
    for positions in ("completion", "prompt"):
        model = steered(layers=LAYER, positions=positions)
        with prompt_length(model, 2):
            full = model(input_ids=ids).logits
        cache = DynamicCache(config=model.config)
        chunks = [model(input_ids=part, past_key_values=cache).logits for part in (ids[:, :2], ids[:, 2:])]
        torch.testing.assert_close(torch.cat(chunks, dim=1), full, rtol=1e-4, atol=1e-5)


# -- transformers' own adapters, without a PeftModel ----------------------------------------------------------------


def native(positions: str) -> torch.nn.Module:
    model = tiny()
    model.add_adapter(SteeringVectorConfig(layers=LAYER, positions=positions))
    fill(model)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("positions", POSITIONS)
def test_add_adapter_generates_like_a_peft_model(positions, beams):
    ids, inside = tokens(2, PROMPT), native(positions)
    model = steered(layers=LAYER, positions=positions)
    assert torch.equal(vector_of(inside), vector_of(model))
    assert torch.equal(greedy(inside, ids, num_beams=beams)[0], greedy(model, ids, num_beams=beams)[0])
    torch.testing.assert_close(greedy(inside, ids)[1], greedy(model, ids)[1])
    assert torch.equal(inside(input_ids=ids, labels=ids).loss, model(input_ids=ids, labels=ids).loss)


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
def test_load_adapter_generates_like_a_peft_model(positions, tmp_path):
    ids, model = tokens(2, PROMPT), steered(layers=LAYER, positions=positions)
    model.save_pretrained(tmp_path)
    inside = tiny()
    inside.load_adapter(str(tmp_path))
    torch.testing.assert_close(greedy(inside, ids)[1], greedy(model, ids)[1])


@torch.no_grad()
@pytest.mark.parametrize("positions", SAID)
def test_without_cache_and_without_a_peft_model_generate_is_the_same(positions):
    ids, model = tokens(2, PROMPT), native(positions)
    torch.testing.assert_close(greedy(model, ids, use_cache=False)[1], greedy(model, ids)[1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_prompt_length_around_generate_says_where_the_prompt_ends():
    """An answer that was begun by others is continued."""
    ids, model = tokens(2, PROMPT), steered(layers=LAYER, positions="completion")
    with prompt_length(model, 3):
        sequences, logits = greedy(model, ids)
        full = model(input_ids=sequences).logits[:, PROMPT - 1 : -1]
    torch.testing.assert_close(logits, full, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("how", ["all tokens", "new tokens"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_second_generate_continues_the_cache_of_the_first(positions, how):
    """What was steered stays so; everything else that the second one is given is its prompt."""
    model, base = native(positions), tiny()
    first = model.generate(tokens(2, PROMPT), min_new_tokens=NEW, max_new_tokens=NEW, return_dict_in_generate=True)
    given = torch.cat([first.sequences, tokens(2, 3, seed=5)], dim=1)
    held, end = first.past_key_values.get_seq_length(), given.shape[1]
    inputs = {"past_key_values": first.past_key_values, "attention_mask": torch.ones_like(given)}
    sequences, logits = greedy(model, given if how == "all tokens" else given[:, held:], **inputs)
    sequences = torch.cat([given, sequences[:, -NEW:]], dim=1)
    column = torch.arange(sequences.shape[1])
    chosen = {
        "all": column >= 0,
        "completion": ((column >= PROMPT) & (column < held)) | (column >= end),
        "prompt": (column < PROMPT) | ((column >= held) & (column < end)),
        "last_prompt": (column == PROMPT - 1) | (column == end - 1),
    }[positions]
    with added(base, vector_of(model), chosen[None]):
        full = base(input_ids=sequences, use_cache=False).logits[:, end - 1 : -1]
    torch.testing.assert_close(logits, full, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
def test_generate_continues_recurrent_states(positions):
    """Mamba is given the new tokens only, and its cache counts none."""
    model = model_of("mamba", positions)
    ids = tokens(2, PROMPT)
    with prompt_length(model, PROMPT):
        cache = model(input_ids=ids[:, :-1], use_cache=True).cache_params
        full = model(input_ids=ids, use_cache=False).logits[:, -1]
    _, logits = greedy(model, ids[:, -1:], new=1, cache_params=cache)
    torch.testing.assert_close(logits[:, 0], full, rtol=1e-4, atol=1e-5)


def test_prompt_length_needs_recurrent_states_that_were_counted():
    model = model_of("mamba", "completion")
    with torch.no_grad():
        cache = tiny("mamba", state_size=4)(input_ids=tokens(), use_cache=True).cache_params
        with (
            prompt_length(model, 12),
            pytest.raises(ValueError, match="recurrent states, and this model did not read their tokens"),
        ):
            model(input_ids=tokens(), cache_params=cache)
        steered_all = model_of("mamba", "all")(input_ids=tokens(), cache_params=copy.deepcopy(cache)).logits
        # nothing said: what is in the cache was the prompt
        torch.testing.assert_close(model(input_ids=tokens(), cache_params=cache).logits, steered_all)


def test_a_list_of_prompts_is_refused():
    with pytest.raises(ValueError, match="continuous batching.*left-padded"):
        steered(positions="completion").generate([[3, 4], [5]])


@pytest.mark.parametrize(
    "how", [{"guidance_scale": 1.5}, {"guidance_scale": 2.0, "negative_prompt_ids": tokens(1, 2)}]
)
def test_guidance_by_a_second_prompt_is_refused(how):
    with pytest.raises(ValueError, match=r"guidance_scale=.* runs a second prompt.*positions='all'"):
        steered(positions="completion").generate(input_ids=tokens(1, 4), **how)
    steered(positions="all").generate(input_ids=tokens(1, 4), max_new_tokens=1, **how)


def test_unload_and_copies_leave_generate_as_it_was():
    ids, model = tokens(2, PROMPT), steered(layers=LAYER, positions="completion")
    copied, expected = copy.deepcopy(model), greedy(model, ids)[1]
    torch.testing.assert_close(greedy(copied, ids)[1], expected)
    assert copied.get_base_model().generate.args[0].__self__ is copied.get_base_model()
    base = model.unload()
    assert "generate" not in vars(base) and hooks_on(base) == 0
    torch.testing.assert_close(greedy(base, ids)[1], greedy(tiny(), ids)[1])


# -- several samples in one row -------------------------------------------------------------------------------------

SAMPLES = [
    (5, 2),
    (3, 0),
    (6, 6),
    (4, 3),
    (4, 4),
]  # tokens, and how many of them are the prompt: 6 of 6 have no answer


def packed(how: str, samples: list[tuple[int, int]] = SAMPLES) -> tuple[dict, list[dict]]:
    """A row of several samples, and each alone."""
    rows = [tokens(1, length, seed=i) for i, (length, _) in enumerate(samples)]
    labels = [torch.where(torch.arange(n) < p, -100, ids) for ids, (n, p) in zip(rows, samples, strict=True)]
    lengths = torch.tensor([length for length, _ in samples])
    ends = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    said = {
        "position_ids": {},
        "cu_seq_lens": {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 6, "max_length_k": 6},
        "seq_idx": {"seq_idx": torch.repeat_interleave(torch.arange(len(samples)), lengths)[None].int()},
    }[how]
    positions = torch.cat([torch.arange(int(n)) for n in lengths])[None]
    row = {"input_ids": torch.cat(rows, dim=1), "labels": torch.cat(labels, dim=1), "position_ids": positions}
    return {**row, **said, "use_cache": False}, [
        {"input_ids": i, "labels": answer} for i, answer in zip(rows, labels, strict=True)
    ]


@torch.no_grad()
@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens", "seq_idx"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_every_sample_of_a_packed_row_has_its_own_prompt(positions, how):
    model = steered(layers=LAYER, positions=positions)
    row, alone = packed(how)
    expected = torch.cat([model(**sample).logits for sample in alone], dim=1)
    torch.testing.assert_close(model(**row).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_packed_row_without_labels_is_refused():
    row, _ = packed("position_ids")
    model = steered(layers=LAYER, positions="completion")
    with pytest.raises(ValueError, match="does not say where the prompt ends"):
        model(**{**row, "labels": None})
    with prompt_length(model, 2), pytest.raises(ValueError, match="several packed samples.*packing=False"):
        model(**row)


def test_a_sample_whose_first_label_alone_is_hidden_is_refused():
    """TRL's padding-free collator hides it whether it was a prompt or not."""
    row, _ = packed("position_ids", [(4, 2), (4, 1)])
    with pytest.raises(ValueError, match=r"prompt of one token looks like an empty one.*padding_free=False"):
        steered(positions="completion")(**row)
    steered(positions="all")(**row)


@pytest.mark.parametrize(
    "positions, expected",
    [
        ("completion", [0, 0, 1, 1, 0, 0, 1, 1, 1]),
        ("prompt", [1, 1, 0, 0, 1, 1, 0, 0, 0]),
        ("last_prompt", [0, 1, 0, 0, 0, 1, 0, 0, 0]),
    ],
)
def test_a_row_of_several_answers_has_a_prompt_before_each(positions, expected):
    """A chat of two turns, or two samples in a row that say nothing else (packing_strategy="wrapped")."""
    ids = tokens(1, 9)
    labels = torch.where(torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1, 0]]).bool(), ids, -100)
    assert moved(steered(layers=LAYER, positions=positions), input_ids=ids, labels=labels).int().tolist() == [expected]


@torch.no_grad()
def test_states_that_are_not_of_the_tokens_are_refused():
    class Pooled(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden).mean(dim=1, keepdim=True)

    base = tiny()
    base.model.layers[LAYER].self_attn.o_proj = Pooled(32, 32)
    model = get_peft_model(base, SteeringVectorConfig(positions="prompt", target_modules=".*1.self_attn.o_proj"))
    with pytest.raises(ValueError, match=r"shape \(2, 1, 32\) for rows of 8 tokens.*positions='all'"):
        model(input_ids=tokens(), labels=tokens())
